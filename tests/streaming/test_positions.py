"""Temporal positions and frequencies: equal to Diffusers' tables, relative, and stretched as stated."""

from __future__ import annotations

import math

import pytest
import torch
from stream_cases import tiny_transformer

from dit_accel.families.wan import rotate_pairs
from dit_accel.pipelines.streaming.positions import THETA, PositionRule, Rotary, time_frequencies
from dit_accel.streaming import Frequencies

GRID = (2, 3)


@pytest.fixture(scope="module")
def rope():
    return tiny_transformer(layers=1).rope


def rotated(rotary, x, positions):
    return rotary.time(rotary.space(x, GRID), positions)


def test_integer_positions_equal_diffusers(rope):
    x = torch.randn(2, 5 * 6, 2, 24)
    tables = rope(torch.empty(1, 4, 5, 4, 6))
    torch.testing.assert_close(rotated(Rotary(rope), x, range(5)), rotate_pairs(x, *tables), atol=1e-6, rtol=0)


def test_rotation_keeps_norms_and_scores_know_differences_only(rope):
    rotary = Rotary(rope)
    q, k = torch.randn(2, 1, 6, 2, 24, dtype=torch.float64)
    scores = [torch.einsum("bqhd,bkhd->bhqk", rotary.time(q, [a + 3]), rotary.time(k, [a])) for a in (0, 7, 5000)]
    torch.testing.assert_close(scores[1], scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(scores[2], scores[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(rotary.time(q, [9]).norm(dim=-1), q.norm(dim=-1), atol=1e-6, rtol=0)


def test_rotating_again_by_the_difference_equals_rotating_at_the_read(rope):
    rotary, x = Rotary(rope), torch.randn(1, 6, 2, 24, dtype=torch.float64)
    rotary._time_table = lambda positions, device: tuple(
        f(torch.tensor(positions, dtype=torch.float64)[:, None, None, None] * rotary._frequencies)
        for f in (torch.cos, torch.sin)
    )
    twice = rotary.time(rotary.time(x, [11.0]), [-4.0])
    torch.testing.assert_close(twice, rotary.time(x, [7.0]), atol=1e-10, rtol=0)


def test_rules():
    frames = [0, 1, 2, 40, 41, 42, 43]
    assert PositionRule("absolute", 3, 64).of(frames, 0) == frames
    assert PositionRule("reindex", 3, 64).of(frames, 0) == list(range(7))
    assert PositionRule("sink_adjacent", 3, 64).of(frames, 0) == [37, 38, 39, 40, 41, 42, 43]
    assert PositionRule("sink_adjacent", 3, 64).of([5, 6], 5) == [5, 6]
    assert PositionRule("absolute", 3, 64).of([70, 71], 70) == [0, 1]


def test_reindexed_positions_never_leave_the_window():
    rule = PositionRule("reindex", 3, 64)
    for end in range(12, 5000, 97):
        positions = rule.of([0, 1, 2, *range(end - 9, end)], 0)
        assert max(positions) == 11
        assert positions[-3:] == [9, 10, 11]


def test_by_parts_stretches_slow_pairs_alone():
    plain = time_frequencies(44, THETA, Frequencies())
    change = Frequencies(mode="by_parts", trained=21, target=126)
    new = time_frequencies(44, THETA, change)
    ratio, turns = new / plain, 21 * plain / (2 * math.pi)
    assert ((ratio <= 1) & (ratio >= 1 / 6 - 1e-12)).all()
    assert (ratio.diff() <= 1e-12).all()
    assert (ratio[turns >= 1] == 1).all()
    torch.testing.assert_close(ratio[turns <= 0.25], torch.full_like(ratio[turns <= 0.25], 1 / 6))
    assert int((turns >= 1).sum()) == 3
    # A fully stretched pair reaches at the target the phase that it had at the end of training.
    torch.testing.assert_close(new[-1] * 126, plain[-1] * 21)


def test_no_stretch_at_the_trained_length_and_continuity():
    plain = time_frequencies(44, THETA, Frequencies())
    same = time_frequencies(44, THETA, Frequencies(mode="by_parts", target=21))
    assert torch.equal(same, plain)
    near = time_frequencies(44, THETA, Frequencies(mode="by_parts", trained=2100, target=2101))
    assert ((near / plain - 1).abs() < 1e-3).all()


def test_riflex_changes_one_pair():
    plain = time_frequencies(44, THETA, Frequencies())
    new = time_frequencies(44, THETA, Frequencies(mode="riflex", target=126, period=22))
    changed = (new != plain).nonzero().flatten()
    assert changed.tolist() == [3]
    assert 2 * math.pi / new[3] == pytest.approx(126 / 0.9)


def test_space_is_not_touched_by_a_change_of_time(rope):
    x = torch.randn(1, 6, 2, 24)
    change = Frequencies(mode="by_parts")
    assert torch.equal(Rotary(rope, change).space(x, GRID), Rotary(rope).space(x, GRID))
    dim = rope.t_dim
    assert torch.equal(Rotary(rope, change).time(x, [5])[..., dim:], x[..., dim:])
    assert not torch.equal(Rotary(rope, change).time(x, [50]), Rotary(rope).time(x, [50]))
