"""Windows on the grid against their rule, evaluated token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel.kernels import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.layout import TokenLayout
from dit_accel.methods.neighborhood import axis_window
from dit_accel.methods.registry import get_method
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.state import CallContext


def rows(length, window, stride=1, dilation=1, causal=False):
    first, end = axis_window(length, window, stride, dilation, causal)
    return [list(range(a, b, dilation)) for a, b in zip(first.tolist(), end.tolist(), strict=True)]


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (8, 4, 1, [0, 0, 0, 1, 2, 3, 4, 4]),
        (8, 3, 2, [0, 0, 2, 2, 4, 4, 5, 5]),
        (9, 3, 3, [0, 0, 0, 3, 3, 3, 6, 6, 6]),
        (8, 3, 3, [0, 0, 0, 3, 3, 3, 5, 5]),
    ],
)
def test_worked_rows(length, window, stride, starts):
    assert [row[0] for row in rows(length, window, stride)] == starts
    assert {len(row) for row in rows(length, window, stride)} == {window}


def test_a_dilated_row():
    found = rows(10, 3, dilation=2)
    assert found[0] == [0, 2, 4]
    assert found[9] == [5, 7, 9]


def test_a_causal_row_is_cut_at_the_start_only():
    assert rows(5, 3, causal=True) == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [2, 3, 4]]


axes = st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(1, 7))


def token_mask(layout, method):
    """The rule, token by token in raster order."""
    mask = torch.ones(1, 1, dtype=torch.uint8)
    for axis in method.axes(layout):
        kept = torch.zeros(axis.length, axis.length, dtype=torch.uint8)
        for x, row in enumerate(rows(axis.length, axis.window, axis.stride, axis.dilation, axis.causal)):
            kept[x, row] = 1
        mask = torch.kron(mask, kept)
    return mask.bool()


def video_plan_mask(method, layout):
    """What the plan computes, token by token in raster order, `[video, video]`."""
    order, plan = method.plan(layout, torch.zeros(1, 1, layout.tokens, 1), torch.zeros(1, 1, layout.tokens, 1))
    got = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    got[order.query.unsqueeze(-1), order.query] = plan.validate().to_token_mask()[0, 0]
    return got[layout.video_slice(), layout.video_slice()]


@settings(max_examples=50, deadline=None)
@given(axes, axes, axes, st.tuples(*[st.sampled_from([1, 2])] * 3), axes, st.booleans(), st.integers(0, 5))
def test_the_plan_is_the_rule_on_any_grid(grid, window, stride, dilation, tile, causal, text):
    layout = TokenLayout(grid, text, "before" if text else "none")
    method = get_method(
        "neighborhood", window=window, stride=stride, dilation=dilation, tile=tile, causal_frames=causal
    )
    assert torch.equal(video_plan_mask(method, layout), token_mask(layout, method))
    plan = method.select(None, None, CallContext(layout))
    words = layout.text_blocks(plan.q_blocks)
    assert plan.to_mask()[..., words, :].all()
    assert plan.to_mask()[..., words].all()


def attend(method, layout, q, k, v):
    order, plan = method.plan(layout, q, k, v)
    return order.restore(block_attention(*order.apply(q, k, v), plan, backend="torch"))


@pytest.mark.parametrize("key_tile", [None, (2, 3, 2)])
def test_attention_equals_the_masked_definition(key_tile):
    layout = TokenLayout((3, 7, 6), 5, "before")
    q, k, v = torch.randn(3, 2, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind()
    method = get_method("neighborhood", window=[2, 3, 4], dilation=[1, 2, 1], stride=[1, 1, 2], key_tile=key_tile)
    mask = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    mask[5:, 5:] = token_mask(layout, method)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(attend(method, layout, q, k, v), expected)


@pytest.mark.parametrize("name", ["neighborhood", "sliding_tile"])
def test_whole_axes_are_dense(name):
    layout = TokenLayout((3, 5, 7))
    q, k, v = torch.randn(3, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind()
    method = get_method(name, window=[0, 0, 0])
    torch.testing.assert_close(attend(method, layout, q, k, v), F.scaled_dot_product_attention(q, k, v))


def plan_of(name, grid, **parameters):
    return get_method(name, **parameters).select(None, None, CallContext(TokenLayout(grid)))


@pytest.mark.parametrize(
    ("window", "density"),
    [
        ((3, 3, 3), 0.09),
        ((5, 5, 5), 125 / 300),
        ((5, 3, 3), 0.15),
        ((1, 6, 10), 0.2),
        ((5, 1, 10), 1 / 6),
        ((5, 6, 1), 0.1),
    ],
)
def test_published_tile_densities(window, density):
    plan = plan_of("sliding_tile", (30, 48, 80), tile=[6, 8, 8], window=window)
    assert plan.density == pytest.approx(density)
    assert plan.full_counts is None


@pytest.mark.parametrize("window", [(1, 2, 3), (3, 4, 0), (5, 1, 10)])
def test_every_tile_sees_a_full_box_and_even_windows_hold_one_tile_more(window):
    plan = plan_of("sliding_tile", (5, 12, 14), tile=(1, 2, 2), window=window)
    counts = (5, 6, 7)
    box = [n if w == 0 else min(n, 2 * (w // 2) + 1) for n, w in zip(counts, window, strict=True)]
    assert set(plan.counts.flatten().tolist()) == {math.prod(box)}


@pytest.mark.parametrize("tiles", [1, 3, 5])
def test_sliding_tiles_are_neighborhoods_with_the_tile_as_stride(tiles):
    grid, tile = (6, 12, 20), (2, 2, 4)
    sliding = plan_of("sliding_tile", grid, tile=tile, window=(tiles,) * 3)
    window = [min(tiles * t, n) for t, n in zip(tile, grid, strict=True)]
    neighborhood = plan_of("neighborhood", grid, tile=tile, window=window, stride=tile)
    assert torch.equal(sliding.to_mask(), neighborhood.to_mask())
    assert neighborhood.predicate is None


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "key_tile", "visited"),
    [
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), None, 165.44),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), None, 81),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (4, 8, 8), (2, 8, 8), 81),
        ((1, 256, 256), (1, 80, 80), (1, 1, 1), (1, 16, 8), None, 68.13),
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 8), None, 50),
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 16), (1, 16, 8), 50),
    ],
)
def test_visited_tiles_of_published_settings(grid, window, stride, tile, key_tile, visited):
    plan = plan_of("neighborhood", grid, window=window, stride=stride, tile=tile, key_tile=key_tile)
    assert plan.counts.double().mean().item() == pytest.approx(visited, abs=6e-3)
    # Strides that fit the tiles leave no block that is attended in part.
    assert (plan.predicate is None) == (max(stride) > 1)


def test_density_sets_the_window():
    for grid in ((8, 16, 16), (1, 32, 32)):
        axes = get_method("neighborhood", density=0.125).axes(TokenLayout(grid))
        assert math.prod(axis.window / axis.length for axis in axes) == pytest.approx(0.125, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(axes, axes, axes, st.tuples(*[st.sampled_from([1, 2, 3])] * 3))
def test_every_query_has_the_same_number_of_keys(grid, window, stride, dilation):
    method = get_method("neighborhood", window=window, stride=stride, dilation=dilation, tile=(2, 2, 2))
    mask = video_plan_mask(method, TokenLayout(grid))
    found = method.axes(TokenLayout(grid))
    assert set(mask.sum(-1).tolist()) == {math.prod(axis.window for axis in found)}
    assert mask.float().mean().item() == pytest.approx(math.prod(axis.window / axis.length for axis in found))


def test_a_stride_equal_to_the_window_is_blocked_attention():
    mask = video_plan_mask(get_method("neighborhood", window=(1, 3, 2), stride=(1, 3, 2)), TokenLayout((2, 6, 4)))
    box = (torch.arange(2).view(-1, 1, 1) * 2 + torch.arange(6).view(-1, 1) // 3) * 2 + torch.arange(4) // 2
    assert torch.equal(mask, box.flatten() == box.flatten().unsqueeze(-1))


def test_queries_of_one_stride_group_share_their_keys():
    mask = video_plan_mask(get_method("neighborhood", window=(0, 1, 5), stride=(1, 1, 3)), TokenLayout((1, 1, 12)))
    for group in range(0, 12, 3):
        assert (mask[group : group + 3] == mask[group]).all()
    assert not torch.equal(mask[0], mask[6])


def test_an_odd_window_is_symmetric_away_from_borders():
    mask = video_plan_mask(get_method("neighborhood", window=(0, 1, 5)), TokenLayout((1, 1, 12)))
    assert mask[5].nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("grid", [(9, 24, 40), (1, 64, 64)])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.6, 1.0])
def test_density_sets_the_window_in_tiles(grid, density):
    plan = plan_of("sliding_tile", grid, tile=(1, 2, 2), density=density)
    assert plan.density == pytest.approx(density, abs=0.02 if density == 1 else 0.3 * density)
    assert (plan.counts == plan.counts.flatten()[0]).all()


def test_dilated_windows_meet_whole_tiles_of_their_group():
    """A published setting for 44 x 80 tokens: window 4 x 16, dilation 11 x 5, 98 % sparse."""
    plan = plan_of("neighborhood", (3, 44, 80), window=(0, 4, 16), dilation=(1, 11, 5), tile=(3, 4, 16))
    assert plan.predicate is None
    assert plan.density == pytest.approx(4 * 16 / (44 * 80))


def test_windows_grow_with_the_grid():
    method = get_method("neighborhood", window=(0, 12, 24), stride=(1, 4, 8), dilation=(1, 1, 1), base_grid=(0, 44, 80))
    assert [(a.window, a.stride) for a in method.axes(TokenLayout((16, 66, 40)))] == [(16, 1), (18, 6), (12, 4)]
    dilated = get_method("neighborhood", window=(0, 4, 16), dilation=(1, 11, 5), base_grid=(0, 44, 80))
    assert [(a.window, a.dilation) for a in dilated.axes(TokenLayout((16, 22, 80)))] == [(16, 1), (2, 6), (16, 5)]


def test_windows_and_text_apart_merge_to_one_softmax():
    layout, text = TokenLayout((2, 4, 6)), 5
    q, k, v = torch.randn(3, 1, 2, layout.tokens + text, 16, generator=torch.Generator().manual_seed(0)).unbind()
    method, joint = get_method("neighborhood", window=(1, 3, 3)), TokenLayout((2, 4, 6), text, "after")
    n = layout.tokens
    order, plan = method.plan(layout, q[:, :, :n], k[:, :, :n])
    near = block_attention(*order.apply(*(x[:, :, :n] for x in (q, k, v))), plan, return_lse=True)
    words = BlockPlan.full(Blocking.uniform(n, 16), Blocking.uniform(text, 16))
    far = block_attention(order.apply(*[q[:, :, :n]] * 3)[0], k[:, :, n:], v[:, :, n:], words, return_lse=True)
    merged = order.restore(merge([near[0], far[0]], [near[1], far[1]])[0])
    torch.testing.assert_close(merged, attend(method, joint, q, k, v)[:, :, :n])


@pytest.mark.parametrize("name", ["neighborhood", "sliding_tile"])
def test_padded_text_has_no_weight(name):
    layout = TokenLayout((2, 4, 5), 9, "after", valid=(43, 49))
    q, k, v = torch.randn(3, 2, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind()
    method = get_method(name, window=(1, 1, 1), tile=(1, 2, 2))
    order, plan = method.plan(layout, q, k, v)
    lengths = torch.tensor(layout.valid)
    out = order.restore(block_attention(*order.apply(q, k, v), plan, kv_len=lengths))
    k[0, :, 43:], v[0, :, 43:] = 99.0, torch.nan
    again = order.restore(block_attention(*order.apply(q, k, v), plan, kv_len=lengths))
    torch.testing.assert_close(again[:, :, :43], out[:, :, :43])
