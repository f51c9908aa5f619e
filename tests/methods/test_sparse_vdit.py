"""Patterns per head and the rule that chooses them."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, plan_of, tensors, video_mask

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.methods.sparse_vdit import SparseVDiT, choose_mode, stripe_columns
from dit_accel.static_masks import half_width


def test_multi_diagonal_is_the_band_expressed_in_the_raster():
    layout = TokenLayout((5, 3, 4), 6, "before")
    method = SparseVDiT(mode="multi_diagonal", density=0.5, block=1)
    t = layout.coordinates
    place = (t[:, 1] * 4 + t[:, 2]) * 5 + t[:, 0]
    width = half_width(layout, 0.5)
    assert 0 < width < 30
    band = (place.unsqueeze(-1) - place).abs() <= width
    assert torch.equal(video_mask(method, layout), band)
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[6:, 6:] = band
    q, k, v = tensors(layout)
    torch.testing.assert_close(attend(method, layout, q, k, v), masked(layout, q, k, v, mask))


@pytest.mark.parametrize("block", [1, 7, 16])
def test_the_diagonal_keeps_the_blocks_that_the_band_touches(block):
    layout = TokenLayout((4, 5, 6))
    i = torch.arange(layout.video)
    band = (i.unsqueeze(-1) - i).abs() <= half_width(layout, 0.3)
    count, owner = -(-layout.video // block), i // block
    touched = torch.zeros(count, count, dtype=torch.bool)
    touched[owner.unsqueeze(-1).expand_as(band)[band], owner.expand_as(band)[band]] = True
    plan = plan_of("sparse_vdit", layout.grid, density=0.3, block=block)
    assert torch.equal(plan.to_mask()[0, 0], touched)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_density_is_kept(density):
    for mode in ("diagonal", "multi_diagonal", "stripe"):
        plan = plan_of("sparse_vdit", (16, 16, 20), mode=mode, density=density, block=16)
        assert plan.density == pytest.approx(density, abs=0.01)


def test_stripes_are_the_same_for_all_queries():
    mask = plan_of("sparse_vdit", (2, 4, 8), mode="stripe", columns=[1, 3], block=16).to_mask()[0, 0]
    assert (mask == torch.tensor([False, True, False, True])).all()
    with pytest.raises(ConfigError, match="the video has 4 blocks of 16 tokens, got column 4"):
        plan_of("sparse_vdit", (2, 4, 8), mode="stripe", columns=[4], block=16)


@pytest.mark.parametrize("position", ["none", "before", "after"])
def test_the_columns_with_most_mass_are_found(position):
    text = 0 if position == "none" else 6
    layout = TokenLayout((2, 4, 8), text, position, valid=(64 + text,))
    q, k, _ = tensors(layout)
    strong = 3 * torch.ones(16)
    q += strong
    for token in (20, 21, 50):
        k[:, :, layout.video_start + token] = strong
    method = SparseVDiT(mode="stripe", density=0.25, block=8)
    found = stripe_columns(q, k, layout, method)
    assert (found == torch.tensor([2, 6])).all()
    assert torch.equal(found, stripe_columns(q, k, layout, method))


def test_the_rule_of_choice():
    skipped = torch.tensor([1.0, 0.7, 0.7, 0.7])

    def chosen(*errors, **rule):
        return int(choose_mode(torch.tensor(errors), skipped, **rule))

    assert chosen(9.0, 9.0, 9.0, 9.0) == 0
    assert chosen(0.95, 0.3, 0.2, 0.4) == 3
    assert chosen(0.30, 0.2, 0.4, 0.4) == 1  # skipping costs nothing, the others 0.15
    assert chosen(0.5, 0.35, 0.35, 0.35) == 1  # equal losses: the mode that skips more
    assert chosen(2.0, 0.2, 0.2, 0.2) == 2
    assert chosen(0.30, 0.2, 0.4, 0.4, weight=0.0) == 2
    assert chosen(1e-9, 1.0, 1.0, 1.0, limit=0.0) == 0
    assert chosen(9.0, 8.0, 9.0, 9.0, limit=1e9) == 2
    many = choose_mode(torch.tensor([[9.0, 9, 9, 9], [0, 9, 9, 9]]), skipped)
    assert many.tolist() == [0, 1]
    assert get_method("sparse_vdit", mode="full").mode == "full"


@pytest.mark.parametrize("layout", [TokenLayout((3, 4, 6)), TokenLayout((3, 4, 6), 7, "before", prefix_frames=1)])
def test_the_full_mode_is_dense(layout):
    q, k, v = tensors(layout)
    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    out = attend(SparseVDiT(mode="full", block=8), layout, q, k, v)
    torch.testing.assert_close(out, masked(layout, q, k, v, everything))
