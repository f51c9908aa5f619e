"""Two processes that share the heads or the queries of a model compute what one process computes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dit_accel.families.parallel import _joined


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    target = tmp_path_factory.mktemp("parallel") / "outcome.json"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(Path(__file__).with_name("worker.py")), str(target)],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())


def test_two_processes_give_what_one_gives(outcome):
    assert {name: value for name, value in outcome["differences"].items() if value > 1e-5} == {}
    assert len(outcome["differences"]) == 12


def test_methods_that_look_at_all_queries_are_refused_under_ring_by_name(outcome):
    assert "'composed': it chooses key blocks by what all queries hold" in outcome["refusal"]


@pytest.mark.parametrize("position", ["before", "after"])
@pytest.mark.parametrize(("video", "text", "world"), [(10, 4, 2), (11, 5, 3), (7, 1, 2)])
def test_the_joint_sequence_is_put_back_in_order(position, video, text, world):
    words, pixels = torch.arange(text) + 1000, torch.arange(video)
    first, second = (words, pixels) if position == "before" else (pixels, words)
    parts = zip(first.tensor_split(world), second.tensor_split(world), strict=True)
    exchanged = torch.cat([torch.cat(part) for part in parts])
    assert torch.equal(exchanged[_joined(video, text, world, position)], torch.cat([first, second]))
