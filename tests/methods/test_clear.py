"""Discs: strict radius, densities, borders, pooled rest and the scale for many tokens."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors, token_mask, video_mask
from torch import nn
from torch.nn import functional as F

from dit_accel.engine import Engine
from dit_accel.layout import TokenLayout
from dit_accel.methods.clear import Clear
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState


def disc(layout, radius, step=1.0):
    """The rule, token by token."""
    at = layout.coordinates * torch.tensor([step, 1.0, 1.0])
    return (at.unsqueeze(1) - at).square().sum(-1) < radius**2


@pytest.mark.parametrize("layout", [TokenLayout((1, 9, 13)), TokenLayout((4, 6, 5), 3, "before")])
@pytest.mark.parametrize(("radius", "step"), [(3.0, 1.0), (2.5, 2.0), (4.0, 0.0), (0.5, 1.0)])
def test_tiles_of_one_token_are_the_disc(layout, radius, step):
    method = Clear(radius=radius, frame_step=step, tile=(1, 1, 1))
    mask = video_mask(method, layout)
    assert torch.equal(mask, disc(layout, radius, step))
    assert torch.equal(mask, mask.T)


@pytest.mark.parametrize("tile", [(1, 2, 3), (2, 4, 4), (9, 9, 9)])
@pytest.mark.parametrize(("radius", "step"), [(3.0, 1.0), (2.5, 2.0), (4.0, 0.0), (5.0, 1.0)])
def test_discs_are_exact_whatever_the_tile(tile, radius, step):
    layout = TokenLayout((3, 9, 10), 4, "after")
    method = Clear(radius=radius, frame_step=step, tile=tile)
    assert torch.equal(video_mask(method, layout), disc(layout, radius, step))
    q, k, v = (x.double() for x in tensors(layout))
    expected = masked(layout, q, k, v, token_mask(method, layout))
    torch.testing.assert_close(attend(method, layout, q, k, v), expected)


def test_a_whole_rim_attends_the_same_tiles_and_masks_nothing():
    layout = TokenLayout((3, 9, 10))
    call = CallContext(layout)
    exact, whole = (Clear(radius=3.0, tile=(1, 3, 4), rim=rim).select(None, None, call) for rim in ("exact", "whole"))
    assert torch.equal(exact.to_mask(), whole.to_mask())
    assert whole.predicate is None
    assert exact.full_counts.sum() < exact.counts.sum()
    for other in ({"density": 0.4}, {"radius": 3.0, "remainder": "mean"}):
        assert Clear(tile=(1, 3, 4), **other).select(None, None, call).predicate is None


@pytest.mark.parametrize("tile", [(1, 2, 3), (2, 4, 4)])
def test_tiles_that_the_disc_touches_are_whole(tile):
    layout = TokenLayout((3, 9, 10))
    blocks, order = tile_blocks(layout, tile), tile_order(layout, tile).query
    owner, kept = blocks.block_of_token(), disc(layout, 3.0)[order][:, order]
    touched = torch.zeros(blocks.count, blocks.count, dtype=torch.bool)
    rows, columns = kept.nonzero().unbind(-1)
    touched[owner[rows], owner[columns]] = True
    assert torch.equal(Clear(radius=3.0, tile=tile).tiles_seen(layout), touched)


@pytest.mark.parametrize(("radius", "keys"), [(8, 193), (16, 793), (32, 3205)])
def test_keys_of_an_inner_query_and_of_a_corner(radius, keys):
    side = 2 * radius + 1
    kept = disc(TokenLayout((1, side, side)), radius)
    assert int(kept[side * side // 2].sum()) == keys
    assert int(kept[0].sum()) < keys / 3


@pytest.mark.parametrize(("radius", "density"), [(8.0, 0.0423), (16.0, 0.1547), (32.0, 0.4819)])
def test_densities_at_64_by_64(radius, density):
    mask = Clear(radius=radius, tile=(1, 1, 1)).tiles_seen(TokenLayout((1, 64, 64)))
    assert int(mask.sum()) / 4096**2 == pytest.approx(density, abs=6e-5)
    assert (int(mask.sum()) + 2 * 512 * 4096 + 512**2) / 4608**2 == pytest.approx(
        {8.0: 0.243, 16.0: 0.332, 32.0: 0.591}[radius], abs=6e-4
    )


@pytest.mark.parametrize(("radius", "sparsity"), [(16, 0.9046), (32, 0.5623)])
def test_a_ball_has_the_density_published_for_video(radius, sparsity):
    """Pairs counted by their offset, on 30 x 48 x 80 tokens."""
    grid = (30, 48, 80)
    offset = [torch.arange(1 - n, n) for n in grid]
    often = [n - x.abs() for n, x in zip(grid, offset, strict=True)]
    t, h, w = (x.square() for x in offset)
    inside = (t[:, None, None] + h[:, None] + w < radius**2).double()
    pairs = torch.einsum("thw,t,h,w->", inside, *(x.double() for x in often))
    assert 1 - pairs.item() / (30 * 48 * 80) ** 2 == pytest.approx(sparsity, abs=6e-5)
    assert Clear(radius=radius).tiles_seen(TokenLayout(grid)).float().mean() > 1 - sparsity


@pytest.mark.parametrize("grid", [(1, 40, 40), (6, 16, 18)])
def test_density_sets_the_radius(grid):
    layout = TokenLayout(grid)
    for density in (1e-9, 0.05, 0.3, 0.7, 1.0):
        seen = Clear(density=density, tile=(1, 2, 2)).tiles_seen(layout)
        assert seen.diagonal().all()
        own = seen.float().mean() if density > 1e-6 else torch.tensor(0.0)
        assert 0.85 * density - 1e-9 <= own <= density or density < 1e-6


def test_a_query_at_exactly_the_radius_is_not_seen():
    mask = video_mask(Clear(radius=3.0, tile=(1, 1, 1)), TokenLayout((1, 1, 8)))
    assert mask[0].tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("position", ["before", "after"])
def test_pooled_tiles_outside_the_disc(position):
    layout = TokenLayout((1, 8, 12), 5, position)
    method = Clear(radius=2.0, tile=(1, 4, 4), remainder="mean")
    q, k, v = (x.double() for x in tensors(layout))
    words, video = layout.text_slice(), layout.video_slice()
    cell = (torch.arange(96) // 12 // 4) * 3 + torch.arange(96) % 12 // 4
    member = F.one_hot(cell).double() / 16  # [96, 6]
    pooled_k, pooled_v = (member.T @ x[:, :, video] for x in (k, v))
    near = method.tiles_seen(layout)[cell]  # [96, 6]
    logits = torch.cat([
        q[:, :, video] @ k[:, :, words].transpose(-1, -2) / 4,
        (q[:, :, video] @ k[:, :, video].transpose(-1, -2) / 4).masked_fill(~near[:, cell], -torch.inf),
        (q[:, :, video] @ pooled_k.transpose(-1, -2) / 4 + torch.tensor(16.0).log()).masked_fill(near, -torch.inf),
    ], -1)  # fmt: skip
    expected = logits.softmax(-1) @ torch.cat([v[:, :, words], v[:, :, video], pooled_v], 2)
    out = attend(method, layout, q, k, v, "reference")
    torch.testing.assert_close(out[:, :, video], expected)
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, words], dense[:, :, words])


@pytest.mark.parametrize("position", ["before", "after"])
def test_pooled_keys_as_published(position):
    layout = TokenLayout((1, 8, 12), 5, position, valid=(101,) if position == "before" else (99,))
    method = Clear(radius=2.0, tile=(1, 2, 3), remainder="pooled", pool=4)
    q, k, v = tensors(layout)
    words, video = layout.text_slice(), layout.video_slice()
    cell = (torch.arange(96) // 12 // 4) * 3 + torch.arange(96) % 12 // 4
    mean = F.one_hot(cell).T.float() / 16
    plain = attend(Clear(radius=2.0, tile=(1, 2, 3)), layout, q, k, v)
    keys, values = (torch.cat([x, mean @ x[:, :, video]], 2) for x in (k, v))
    mask = torch.ones(layout.tokens, layout.tokens + 6, dtype=torch.bool)
    mask[video, video] = video_mask(method, layout)
    mask[:, layout.valid[0] : layout.tokens] = False
    expected = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)[:, :, video]
    call = CallContext(layout)
    out = attend(method, layout, q, k, v, call=call)
    torch.testing.assert_close(out[:, :, video], expected)
    assert torch.equal(out[:, :, words], plain[:, :, words])
    assert call.extra_density == pytest.approx(6 * 96 / 101**2)


def test_the_proportional_scale():
    trained, large = TokenLayout((1, 64, 64), 512, "before"), TokenLayout((1, 128, 128), 512, "before")
    method = Clear(proportional=True)
    assert method.logit_scale(64, trained) == pytest.approx(1 / 8)
    assert method.logit_scale(64, large) > 1 / 8
    assert Clear().logit_scale(64, large) is None
    layout = TokenLayout((1, 6, 8))
    q, k, v = (x.transpose(1, 2) for x in tensors(layout))
    layer = nn.Identity()
    engine = Engine(Clear(proportional=True, radius=99.0), Schedule(), [layer], break_even=1.0)
    engine.begin(RunState(layout.grid, 0, 0.5))
    got = engine.attend(layer, q, k, v, dense=lambda: q).transpose(1, 2)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, scale=method.logit_scale(16, layout)))
