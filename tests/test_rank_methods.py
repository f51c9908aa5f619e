"""The ranking by paired renders: a killed run goes on where it stopped, and rows of other settings do not mix in."""

from __future__ import annotations

import csv

import pytest

from dit_accel.compare.tasks import make_tasks
from dit_accel.models import load_pipeline
from dit_accel.presets import load_preset
from dit_accel.samples import rank_methods
from dit_accel.samples.rank_methods import RANDOM, candidates_of, fingerprint, kept_rows, page, rank, write_rows

METHODS = ("pisa", "composed:order=bisect,block=16")


@pytest.fixture(scope="module")
def setting():
    pytest.importorskip("skimage")
    preset = load_preset("tiny-wan")
    small = {"num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
    generation = preset.generation.model_copy(update=small)
    candidates = candidates_of(METHODS, preset, 0.5, 1)
    tasks, criteria = make_tasks(preset, (), 2, 0)
    return preset, generation, candidates, tasks, criteria


def test_candidates_share_density_and_schedule(setting):
    _, _, candidates, *_ = setting
    assert [c.label for c in candidates] == ["dense", RANDOM, *METHODS]
    assert all(c.method.requested_density == 0.5 for c in candidates[1:])
    assert all(c.schedule.dense_steps == ((0, 1),) for c in candidates[1:])


def test_a_killed_run_goes_on_and_the_page_ranks(setting, tmp_path, monkeypatch):
    preset, generation, candidates, tasks, criteria = setting
    run = fingerprint(preset.repository, generation, candidates, len(tasks))
    assert run != fingerprint(preset.repository, generation, candidates[:-1], len(tasks))
    path, pipe = tmp_path / "ranking.csv", load_pipeline(preset.repository)
    first = rank(pipe, generation, tasks[:1], candidates, path, run)
    # Killed in the middle of the second prompt: what it had of it does not count.
    write_rows(path, [*first, {**first[0], "prompt": tasks[1].prompt, "seed": tasks[1].seed}])
    rendered = []
    monkeypatch.setattr(rank_methods, "run_task", _counting(rank_methods.run_task, rendered))
    rows = rank(pipe, generation, tasks, candidates, path, run)
    assert rendered == [tasks[1].prompt]
    assert len(rows) == 8
    with path.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 8
    assert kept_rows(path, "another run") == []
    assert rank(pipe, generation, tasks, candidates, path, run) == kept_rows(path, run)
    text = page(rows, criteria, generation, "a rule")
    assert text.index("| dense |") < text.index("| pisa |")
    assert "of 2 |" in text


def _counting(run_task, rendered):
    def counted(pipe, generation, task, *args, **kwargs):
        rendered.append(task.prompt)
        return run_task(pipe, generation, task, *args, **kwargs)

    return counted
