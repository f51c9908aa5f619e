"""Layouts and orders: where tokens stand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import PlanError
from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, permute, video_order
from dit_accel.plan import Blocking

grids = st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 5))


@given(grids, st.integers(1, 20), st.sampled_from(["before", "after"]), st.integers(1, 8))
def test_text_and_video_never_share_a_block(grid, text, position, size):
    layout = TokenLayout(grid, text, position)
    blocks = layout.blocks(size)
    is_text = torch.zeros(layout.tokens, dtype=torch.bool)
    is_text[layout.text_slice()] = True
    assert torch.equal(layout.text_blocks(blocks)[blocks.block_of_token()], is_text)
    assert blocks.tokens == layout.tokens == layout.video + text
    assert (layout.video_start == text) == (position == "before")


@given(grids)
def test_coordinates_are_in_raster_order(grid):
    layout = TokenLayout(grid)
    frame, row, column = layout.coordinates.unbind(-1)
    _, height, width = grid
    assert torch.equal((frame * height + row) * width + column, torch.arange(layout.video, dtype=torch.int32))


def test_the_video_may_be_cut_in_its_own_way():
    layout = TokenLayout((2, 2, 3), 5, "before")
    blocks = layout.blocks(4, video=Blocking.from_lengths([6, 6]))
    assert blocks.lengths.tolist() == [4, 1, 6, 6]
    with pytest.raises(PlanError, match="blocking of 12 video tokens, got 10"):
        layout.blocks(4, video=Blocking.uniform(10, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"grid": (0, 2, 2)}, "each at least 1"),
        ({"grid": (2, 2)}, "frames, height, width"),
        ({"grid": (1, 2, 2), "text": 3}, "use 'before' or 'after'"),
        ({"grid": (1, 2, 2), "text_position": "after"}, "use 'before' or 'after'"),
        ({"grid": (1, 2, 2), "text": 3, "text_position": "middle"}, "use 'before' or 'after'"),
        ({"grid": (1, 2, 2), "valid": (5,)}, r"lengths in \[1, 4\]"),
        ({"grid": (1, 2, 2), "prefix_frames": 2}, "expected 0 to 1"),
    ],
)
def test_faulty_layouts_are_refused(values, message):
    with pytest.raises(PlanError, match=message):
        TokenLayout(**values)


def test_padding_is_a_length():
    assert not TokenLayout((1, 2, 2), 4, "after", valid=(8, 8)).is_padded
    assert TokenLayout((1, 2, 2), 4, "after", valid=(8, 6)).is_padded


@settings(max_examples=30)
@given(st.integers(1, 12), st.sampled_from([(), (1, 3), (2, 1), (2, 3)]), st.integers(0, 9))
def test_restore_undoes_apply(tokens, axes, seed):
    generator = torch.Generator().manual_seed(seed)
    order = TokenOrder(torch.rand(*axes, tokens, generator=generator).argsort(-1)).validate()
    q = torch.randn(2, 3, tokens, 4, generator=generator)
    ordered, k, v = order.apply(q, q, q)
    assert torch.equal(order.restore(ordered), q)
    assert torch.equal(order.restore(permute(q[..., 0], order.query)), q[..., 0])
    assert torch.equal(k, v)
    assert order.is_shared == (axes == ())


def test_keys_may_stand_in_another_order_than_queries():
    order = TokenOrder(torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1])).validate()
    x = torch.arange(3.0).view(1, 1, 3, 1)
    q, k, _ = order.apply(x, x, x)
    assert q.flatten().tolist() == [0, 1, 2]
    assert k.flatten().tolist() == [2, 0, 1]
    assert not order.is_shared


def test_attention_does_not_depend_on_the_order():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 9, 4, generator=generator) for _ in range(3))
    order = TokenOrder(torch.rand(1, 2, 9, generator=generator).argsort(-1), torch.randperm(9, generator=generator))
    attend = torch.nn.functional.scaled_dot_product_attention
    torch.testing.assert_close(order.restore(attend(*order.apply(q, k, v))), attend(q, k, v))


@pytest.mark.parametrize("position", ["before", "after"])
def test_an_order_of_the_video_leaves_text_in_place(position):
    layout = TokenLayout((1, 2, 2), 3, position)
    index = video_order(layout, torch.tensor([3, 2, 1, 0])).validate().query.tolist()
    assert index == ([0, 1, 2, 6, 5, 4, 3] if position == "before" else [3, 2, 1, 0, 4, 5, 6])


def test_faulty_orders_are_refused():
    with pytest.raises(PlanError, match="int64"):
        TokenOrder(torch.tensor([0, 1], dtype=torch.int32))
    with pytest.raises(PlanError, match="not a permutation"):
        TokenOrder(torch.tensor([0, 0])).validate()
    with pytest.raises(PlanError, match=r"TokenOrder\.key"):
        TokenOrder(torch.tensor([0, 1]), torch.tensor([0, 2])).validate()
