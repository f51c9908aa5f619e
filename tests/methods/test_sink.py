"""Sink and recent tokens or frames, by their formulas."""

from __future__ import annotations

import pytest
import torch
from method_cases import plan_of, video_mask

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext


@pytest.mark.parametrize("n_init", [0, 3, 8, 30])
@pytest.mark.parametrize("n_local", [1, 5, 8, 40])
def test_row_counts_of_the_causal_a_shape(n_init, n_local):
    layout = TokenLayout((2, 3, 6), 4, "before")
    mask = video_mask(get_method("a_shape", causal=True, n_init=n_init, n_local=n_local, block=8), layout)
    expected = [min(i + 1, n_local) + max(0, min(n_init, i + 1 - n_local)) for i in range(layout.video)]
    assert mask.sum(-1).tolist() == expected
    assert not mask.triu(1).any()


@pytest.mark.parametrize(("n_init", "n_local", "n_last"), [(3, 5, 0), (0, 1, 7), (20, 4, 20), (9, 40, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_a_shape_token_by_token(n_init, n_local, n_last, causal):
    layout = TokenLayout((2, 3, 6))
    i, j = torch.arange(layout.video).unsqueeze(-1), torch.arange(layout.video)
    expected = ((i - j).abs() < n_local) | (j < n_init) | ((i >= layout.video - n_last) & (n_last > 0))
    expected &= (j <= i) | (not causal)
    if n_init + n_last > layout.video:  # the last queries that stand in the sink count as sink
        expected[:n_init] = ((i - j).abs() < n_local)[:n_init] | (j < n_init)
        expected[:n_init] &= ((j <= i) | (not causal))[:n_init]
    method = get_method("a_shape", n_init=n_init, n_local=n_local, n_last=n_last, causal=causal, block=8)
    assert torch.equal(video_mask(method, layout), expected)


def test_blocks_inside_the_band_are_whole():
    plan = plan_of("a_shape", (4, 16, 16), n_init=64, n_local=257)
    assert int(plan.full_counts.sum()) > int(plan.counts.sum()) * 0.6


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sink", [0, 1, 2])
def test_frames_seen(sink, causal):
    layout = TokenLayout((6, 3, 5))
    mask = video_mask(get_method("sink_recent", sink_frames=sink, recent_frames=2, causal=causal, block=4), layout)
    frame = layout.coordinates[:, 0]
    for i in range(6):
        seen = {j for j in range(6) if (abs(i - j) < 2 or j < sink) and (j <= i or not causal)}
        rows = mask[frame == i]
        assert set(frame[rows[0]].tolist()) == seen
        assert int(rows.sum()) == len(seen) * 15 * 15


def test_conditioning_frames_are_a_sink():
    layout = TokenLayout((6, 2, 2), prefix_frames=2)
    seen = get_method("sink_recent", recent_frames=1).frames_seen(layout)
    assert seen[:, :2].all()
    assert not seen[0, 2]


def test_frame_blocks_have_no_partial_blocks_on_any_frame_size():
    plan = plan_of("sink_recent", (5, 7, 9), block=16)
    assert plan.predicate is None
    assert plan.q_blocks.count == 5 * 4


def test_density_sets_the_recent_frames():
    layout = TokenLayout((21, 2, 2))
    for density in (0.2, 0.5, 1.0):
        plan = get_method("sink_recent", density=density).select(None, None, CallContext(layout))
        assert density - 0.1 < plan.density <= density


@pytest.mark.parametrize("density", [0.1, 0.4, 1.0])
def test_density_sets_the_band(density):
    layout = TokenLayout((8, 16, 16))
    mask = video_mask(get_method("a_shape", density=density, n_init=0), layout)
    assert mask.float().mean().item() == pytest.approx(density, abs=2e-3)
