"""The study of the remainder: what it captures, and that it writes its page."""

from __future__ import annotations

import pytest

from dit_accel.presets import Generation, load_preset
from dit_accel.samples import remainder_cases, study_remainder
from dit_accel.samples.captured_attention import captured, synthetic
from dit_accel.samples.rank_methods import PAIRS
from dit_accel.samples.recall_table import ranking
from dit_accel.samples.remainder_cases import DROP, whole_blocks
from dit_accel.samples.remainder_report import read_figures, write_all
from dit_accel.samples.tiny_random import random_wan_pipeline

CALLS = synthetic()[:1]


def test_captured_calls_are_those_of_all_layers_at_the_steps_asked_for():
    pipe = random_wan_pipeline()
    generation = Generation(height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=2.0, fps=8)
    calls = captured(pipe, generation, "a dog", 0, (0, 2))
    layers = len(pipe.transformer.blocks)
    assert [(call.layer, call.step) for call in calls] == [(layer, step) for step in (0, 2) for layer in range(layers)]
    assert all(call.qkv[0].shape[2] == call.layout.tokens for call in calls)


def test_the_page_holds_the_bar_and_every_method(tmp_path, monkeypatch):
    chosen = tuple(case for case in remainder_cases.CASES if case.label in ("PISA", "aurora", DROP))
    monkeypatch.setattr(remainder_cases, "CASES", chosen)
    monkeypatch.setattr(remainder_cases, "DENSITIES", (0.125, 0.25))
    calls = synthetic()[:1]
    figures = study_remainder.measured(calls, study_remainder.runs(), "a field")
    text = write_all(figures, figures[:3], ["none"], "a command", tmp_path)
    assert (tmp_path / "remainder-study.md").read_text() == text
    assert all(f"| {case.label} |" in text for case in chosen)
    assert "Best published method by median error: PISA." in text
    assert "worse on 0 of 1 calls" in text
    read = read_figures(tmp_path / "remainder-study.csv")
    assert [(f.label, f.call, f.requested) for f in read] == [(f.label, f.call, f.requested) for f in figures]
    assert len(read) == 3 * 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "remainder-study.md",
        "remainder-study.csv",
        "remainder-error-over-density.png",
        "remainder-error-over-time.png",
    }


def test_all_methods_get_as_many_whole_blocks():
    call = synthetic()[0]
    assert whole_blocks(0.13, call.layout.tokens) == 4 / 32
    assert whole_blocks(0.001, call.layout.tokens) == 1 / 32
    chosen = [(case, 0.13) for case in remainder_cases.CASES if case.label in ("PISA", "aurora")]
    assert [f.density for f in study_remainder.measured([call], chosen)] == [pytest.approx(4 / 32)] * 2


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    prompts, seen = ["one", "two"], []
    preset = load_preset("tiny-wan")
    every = study_remainder.folder_of(tmp_path, preset, prompts, [3])
    monkeypatch.setattr(remainder_cases, "CASES", remainder_cases.CASES[:1])
    monkeypatch.setattr(study_remainder, "captured", lambda pipe, generation, prompt, *_: seen.append(prompt) or CALLS)
    first = study_remainder.on_calls(None, preset, prompts[:1], [3], tmp_path)
    whole = study_remainder.on_calls(None, preset, prompts, [3], tmp_path)
    assert seen == prompts
    assert [figure.call for figure in whole] == [figure.call.replace("one", p) for p in prompts for figure in first]
    here = study_remainder.folder_of(tmp_path, preset, prompts, [3])
    assert here == study_remainder.folder_of(tmp_path, preset, prompts, [3])
    assert here not in (every, study_remainder.folder_of(tmp_path, preset, prompts, [4]))


def test_the_page_of_methods_takes_over_the_pairs_of_the_ranking(tmp_path):
    path = tmp_path / "ranking.md"
    assert ranking(path) == []
    path.write_text(f"# Methods ranked\n\na table\n\n{PAIRS}\n\n| method |\n|---|\n| pisa |\n")
    lines = ranking(path)
    assert lines[-4:] == ["| method |", "|---|", "| pisa |", ""]
    assert "a table" not in "\n".join(lines)


def test_the_index_of_methods_links_all_of_them(monkeypatch):
    from pathlib import Path

    from dit_accel.methods.registry import list_methods
    from dit_accel.samples.recall_table import index

    monkeypatch.chdir(Path(__file__).parents[1])
    lines = index()
    for name in set(list_methods()) - {"dense"}:
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        assert "(methods/" in row, name
