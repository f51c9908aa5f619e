"""Windows on the grid against their rule, evaluated token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.neighborhood import axis_window
from dit_accel.methods.registry import get_method
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
    window, mask = method.windows(layout), None
    for axis in range(3):
        length, dilation = layout.grid[axis], method._dilation(layout)[axis]
        kept = torch.zeros(length, length, dtype=torch.bool)
        stride = min(method.stride[axis], window[axis])
        for x, row in enumerate(rows(length, window[axis], stride, dilation, method.causal_frames and axis == 0)):
            kept[x, row] = True
        kept = kept.to(torch.uint8)
        mask = kept if mask is None else torch.kron(mask, kept)
    return mask.bool()


@settings(max_examples=50, deadline=None)
@given(axes, axes, axes, st.tuples(*[st.sampled_from([1, 2])] * 3), axes, st.booleans(), st.integers(0, 5))
def test_the_plan_is_the_rule_on_any_grid(grid, window, stride, dilation, tile, causal, text):
    layout = TokenLayout(grid, text, "before" if text else "none")
    method = get_method(
        "neighborhood", window=window, stride=stride, dilation=dilation, tile=tile, causal_frames=causal
    )
    order, plan = method.plan(layout, torch.zeros(1, 1, layout.tokens, 1), torch.zeros(1, 1, layout.tokens, 1))
    got = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    got[order.query.unsqueeze(-1), order.query] = plan.validate().to_token_mask()[0, 0]
    video = layout.video_slice()
    assert torch.equal(got[video, video], token_mask(layout, method))
    text_rows = layout.text_slice()
    assert got[text_rows].all()
    assert got[:, text_rows].all()


def attend(method, layout, q, k, v):
    order, plan = method.plan(layout, q, k, v)
    return order.restore(block_attention(*order.apply(q, k, v), plan, backend="torch"))


def test_attention_equals_the_masked_definition():
    layout = TokenLayout((3, 7, 6))
    q, k, v = torch.randn(3, 2, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind()
    method = get_method("neighborhood", window=[2, 3, 4], dilation=[1, 2, 1], stride=[1, 1, 2])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(layout, method))
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


@pytest.mark.parametrize("tiles", [1, 3, 5])
def test_sliding_tiles_are_neighborhoods_with_the_tile_as_stride(tiles):
    grid, tile = (6, 12, 20), (2, 2, 4)
    sliding = plan_of("sliding_tile", grid, tile=tile, window=(tiles,) * 3)
    window = [min(tiles * t, n) for t, n in zip(tile, grid, strict=True)]
    neighborhood = plan_of("neighborhood", grid, tile=tile, window=window, stride=tile)
    assert torch.equal(sliding.to_mask(), neighborhood.to_mask())
    assert neighborhood.predicate is None


@pytest.mark.parametrize(
    ("grid", "window", "stride", "tile", "visited"),
    [
        ((30, 48, 80), (18, 24, 24), (1, 1, 1), (2, 8, 8), 165.44),
        ((30, 48, 80), (18, 24, 24), (16, 8, 8), (2, 8, 8), 81),
        ((1, 256, 256), (1, 80, 80), (1, 1, 1), (1, 16, 8), 68.13),
        ((1, 256, 256), (1, 80, 80), (1, 16, 16), (1, 16, 8), 50),
    ],
)
def test_visited_tiles_of_published_settings(grid, window, stride, tile, visited):
    plan = plan_of("neighborhood", grid, window=window, stride=stride, tile=tile)
    assert plan.counts.double().mean().item() == pytest.approx(visited, abs=6e-3)


def test_density_sets_the_window():
    for grid in ((8, 16, 16), (1, 32, 32)):
        method = get_method("neighborhood", density=0.125)
        share = math.prod(method.windows(TokenLayout(grid))) / math.prod(grid)
        assert share == pytest.approx(0.125, abs=0.02)
