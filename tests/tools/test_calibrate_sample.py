"""The sample that proves calibration: it writes its page, stops when the time is up and goes on where it stopped."""

from __future__ import annotations

import csv
import sys

import pytest
import torch

from dit_accel.calibrate.weights import fingerprint
from dit_accel.compare import resume
from dit_accel.presets import Generation, load_preset
from dit_accel.samples import calibrate_tiny_wan as sample
from dit_accel.samples.tiny_random import random_wan_pipeline

SMALL = Generation(height=48, width=48, num_frames=9, num_inference_steps=2, guidance_scale=2.0, fps=5)
UNIFORM = ["composed:density=0.3", "composed:density=0.6"]


@pytest.fixture
def proof(monkeypatch, tmp_path):
    """Runs the sample on a random model at the size of a test; gives the prompts that were generated, and the page."""
    shipped = load_preset("tiny-wan/composed")
    schedule = shipped.schedule.model_copy(update={"min_tokens": 0})
    small = shipped.model_copy(update={"generation": SMALL, "schedule": schedule})
    pipe, made = random_wan_pipeline(), []
    monkeypatch.setattr(sample, "load_preset", lambda name: small)
    monkeypatch.setattr(sample, "load_pipeline", lambda name: pipe)
    run_all = resume.run_all

    def counted(pipe, generation, tasks, candidates, inputs=None):
        for outcome in run_all(pipe, generation, tasks, candidates):
            made.append(outcome[0][0].task.seed)
            yield outcome

    monkeypatch.setattr(resume, "run_all", counted)

    def run(minutes):
        made.clear()
        words = ["--num-prompts", "2", "--calibration-prompts", "1", "--steps", "4", "--candidates", *UNIFORM]
        words += ["--num-frames", "5", "--later", UNIFORM[0], "--seed", 3]
        words += ["--output", tmp_path / "work", "--results", tmp_path / "results", "--max-minutes", minutes]
        monkeypatch.setattr(sys, "argv", ["samples/calibrate_tiny_wan.py", *map(str, words)])
        sample.main()
        return list(made), (tmp_path / "results" / "calibration.md").read_text()

    run.rows = tmp_path / "results" / "calibration.csv"
    run.pipe = pipe
    return run


def test_it_stops_when_the_time_is_up_goes_on_and_repeats_nothing(proof, capsys):
    made, page = proof(0)
    assert made == [3]
    assert "prompts: 1 of 2" in page
    assert "the time is up" in capsys.readouterr().err
    made, page = proof(60)
    assert made == [4]
    assert "prompts: 2 of 2" in page
    assert "command: python samples/calibrate_tiny_wan.py --num-prompts 2" in page
    for word in ("torch: ", "device: ", "date: ", "weights: ", "At equal time the calibrated presets are closer"):
        assert word in page
    rows = list(csv.DictReader(proof.rows.open()))
    labels = {row["candidate"] for row in rows}
    assert {"dense", *UNIFORM, f"{UNIFORM[0]},dense_steps=2"} < labels
    assert sum(label.startswith("calibrated for") for label in labels) >= 1
    assert len(rows) == 2 * len(labels)
    assert proof(60)[0] == []


def test_other_weights_are_another_calibration(proof):
    before = fingerprint(proof.pipe)
    assert fingerprint(proof.pipe) == before
    with torch.no_grad():
        proof.pipe.transformer.blocks[0].attn1.to_q.weight[0, 0] += 1
    assert fingerprint(proof.pipe) != before
