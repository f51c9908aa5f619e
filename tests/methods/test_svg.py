"""Sparse VideoGen: widths, placement, masks, and heads called by their kind."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors

from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.methods.svg import SVG, plans_of_kinds
from dit_accel.state import CallContext
from dit_accel.static_masks import half_width, token_major

PLAIN = TokenLayout((4, 3, 5))
WORDS = TokenLayout((4, 3, 5), 7, "before")
PADDED = TokenLayout((4, 3, 5), 7, "after", valid=(62, 67))


@pytest.mark.parametrize(
    ("layout", "density", "rounding", "width", "realised"),
    [
        (TokenLayout((21, 45, 80)), 0.3, "up", 12416, 0.340),
        (TokenLayout((21, 30, 52)), 0.25, "up", 4480, 0.295),
        (TokenLayout((33, 45, 80), 256, "after"), 0.25, "down", 15616 - 1, 0.249),
        (TokenLayout((11, 48, 85), 226, "before"), 0.25, "down", 5760 - 1, 0.248),
        (TokenLayout((13, 30, 45), 226, "before"), 0.25, "down", 2048 - 1, 0.239),
    ],
)
def test_published_widths_and_densities(layout, density, rounding, width, realised):
    assert half_width(layout, density, rounding) == width
    i = torch.arange(layout.video)
    lower, upper = (i - width).clamp(min=0), (i + width).clamp(max=layout.video - 1)
    kept = upper - lower + 1
    if rounding == "up":  # released for Wan, with the first frame as a sink
        kept += lower.clamp(max=layout.frame_tokens)
    pairs = kept.sum().item() + 2 * layout.text * layout.video + layout.text**2
    assert pairs / layout.tokens**2 == pytest.approx(realised, abs=1e-3)


def test_placement_of_three_frames_of_four_tokens():
    order = token_major(TokenLayout((3, 2, 2), 2, "before")).validate()
    assert order.query.tolist() == [0, 1, *(2 + i for i in (0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11))]
    x = torch.randn(1, 1, 14, 3)
    assert torch.equal(order.restore(order.apply(x, x, x)[0]), x)
    kept = token_major(TokenLayout((3, 2, 2)), leading=1).query
    assert kept.tolist() == [0, 1, 2, 3, 4, 8, 5, 9, 6, 10, 7, 11]


def definition(method, layout):
    """The masks of a spatial and a temporal head, token by token in raster order, bool `[2, N, N]`."""
    at = layout.coordinates
    frame, place = at[:, 0], at[:, 1] * layout.grid[2] + at[:, 2]
    width, out = half_width(layout, method.density, method.rounding), []
    for position in (frame * layout.frame_tokens + place, place * layout.frames + frame):
        mask = (position.unsqueeze(-1) - position).abs() <= width
        if method.sink == "frame" and layout.frames > 1:
            mask |= frame < max(1, layout.prefix_frames)
        if method.sink == "reordered":
            mask |= position < layout.frame_tokens
        whole = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
        whole[layout.video_slice(), layout.video_slice()] = mask
        out.append(whole)
    return torch.stack(out)


@pytest.mark.parametrize("layout", [PLAIN, WORDS, PADDED, TokenLayout((1, 6, 7), 3, "before"),
                                    TokenLayout((5, 2, 4), prefix_frames=2)])  # fmt: skip
@pytest.mark.parametrize("sink", ["frame", "reordered", "none"])
@pytest.mark.parametrize("block", [1, 7, 16])
def test_every_head_attends_by_the_definition_of_its_kind(layout, sink, block):
    method, call = SVG(density=0.45, block=block, sink=sink, rows=layout.video), CallContext(layout)
    q, k, v = tensors(layout, batch=2, heads=5)
    out = attend(method, layout, q, k, v, call=call)
    kinds = definition(method, layout)
    temporal = method.classify(q, k, v, call)
    assert layout.frames == 1 or 0 < temporal.sum() < temporal.numel()
    torch.testing.assert_close(out, masked(layout, q, k, v, kinds[temporal.long()]))


def test_blocks_that_the_definition_touches_are_computed():
    method = SVG(density=0.3, block=8, rim="whole")
    plan = method.plan_of_kinds(WORDS)
    blocks, masks = plan.q_blocks, plan.to_mask()[0]
    assert plan.predicate is None
    assert torch.equal(SVG(density=0.3, block=8).plan_of_kinds(WORDS).to_mask()[0], masks)
    for kind, order in enumerate((torch.arange(WORDS.tokens), method.temporal_order(WORDS))):
        token = definition(method, WORDS)[kind][order][:, order]
        owner = blocks.block_of_token()
        touched = torch.zeros(blocks.count, blocks.count, dtype=torch.int64)
        touched.index_put_(
            (owner.unsqueeze(-1).expand_as(token), owner.expand_as(token)), token.long(), accumulate=True
        )
        assert (masks[kind] >= (touched > 0)).all()
        assert masks[kind].sum() < 1.1 * (touched > 0).sum()


@pytest.mark.parametrize("sink", ["frame", "reordered", "none"])
@pytest.mark.parametrize("layout", [PLAIN, WORDS, PADDED])
def test_full_density_is_dense(sink, layout):
    q, k, v = tensors(layout, batch=2)
    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    out = attend(SVG(density=1.0, sink=sink, block=16), layout, q, k, v)
    torch.testing.assert_close(out, masked(layout, q, k, v, everything))


def planted(layout, axis):
    """Queries and keys that agree when their coordinates on `axis` (0: frame, 1: place) are near."""
    at = layout.coordinates
    x = (at[:, 0] if axis == 0 else at[:, 1] * layout.grid[2] + at[:, 2]).float()
    wave = torch.outer(x, torch.pi * torch.arange(1, 9) / (x.max() + 1))
    code = 3 * torch.cat([wave.sin(), wave.cos()], -1)
    return code.expand(1, 1, -1, -1)


@pytest.mark.parametrize("profile", [None, 1.5])
def test_planted_heads_are_called_by_their_kind(profile):
    layout = TokenLayout((8, 8, 16))
    code = torch.cat([planted(layout, 0), planted(layout, 1)], 1)
    v = tensors(layout)[2]
    method = SVG(density=0.4, rows=32, sink="none", profile_frames=profile)
    assert method.classify(code, code, v, CallContext(layout)).tolist() == [[False, True]]


def test_a_tie_is_spatial():
    layout = TokenLayout((1, 4, 5))  # one frame: both orders are the same
    q, k, v = tensors(layout)
    errors = SVG(density=0.3, block=4).errors(q, k, v, CallContext(layout))
    assert torch.equal(errors[..., 0], errors[..., 1])
    assert not SVG(density=0.3, block=4).classify(q, k, v, CallContext(layout)).any()


@pytest.mark.parametrize("layout", [PLAIN, PADDED])
def test_errors_of_all_rows_are_the_exact_errors(layout):
    method = SVG(density=0.3, block=4, rows=10**6)
    q, k, v = tensors(layout, batch=2)
    got = method.errors(q, k, v, CallContext(layout))
    video = layout.video_slice()
    dense = masked(layout, q, k, v, torch.ones(layout.tokens, layout.tokens, dtype=torch.bool))
    for kind, mask in enumerate(definition(method, layout)):
        exact = (masked(layout, q, k, v, mask) - dense)[:, :, video].square().mean((-1, -2))
        torch.testing.assert_close(got[..., kind], exact)


def test_same_seed_same_heads_and_padding_has_no_say():
    method = SVG(density=0.3, block=8, rows=5)
    q, k, v = tensors(PADDED, batch=2)
    first, again, other = (method.errors(q, k, v, CallContext(PADDED, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    k[0, :, 62:], v[0, :, 62:] = 99.0, torch.nan
    assert torch.equal(method.errors(q, k, v, CallContext(PADDED)), first)
    out = attend(method, PADDED, q, k, v)
    assert out[0, :, :62].isfinite().all()


def test_plans_are_built_once_and_shared_by_heads():
    method = SVG(sink="reordered", block=8)
    plan = plans_of_kinds(method, PLAIN, torch.device("cpu"))
    assert plan is plans_of_kinds(method, PLAIN, torch.device("cpu"))
    assert plan.indices.shape[:2] == (1, 1)
    q, k, v = tensors(PLAIN, heads=3)
    order, plan = get_method("svg", block=8).plan(PLAIN, q, k, v)
    assert plan.indices.shape[1] == 3
    block_attention(*order.apply(q, k, v), plan.validate())
