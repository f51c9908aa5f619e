"""Orders of tokens: permutations on any grid, and what each of them promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import tensors

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.content import gray_rank, hot_key_order, hotness, kmeans_order, lsh_order
from dit_accel.orders.space import axes_order, bisection_order, hilbert_order, morton_order
from dit_accel.plan import Blocking
from dit_accel.state import CallContext

grids = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 20), st.integers(0, 5))
def test_orders_of_the_grid_permute_the_video_and_leave_text(grid, block, text):
    layout = TokenLayout(grid, text, "before" if text else "none")
    for order in (
        morton_order(layout),
        hilbert_order(layout),
        bisection_order(layout, block, (1, 2, 2)),
        axes_order(layout, ("hwf",)),
        axes_order(layout, ("whf", "fwh")),
    ):
        order.validate()
        assert (order.query[..., :text] == torch.arange(text)).all()
        assert torch.equal(order.query.gather(-1, order.inverse), torch.arange(layout.tokens).expand(order.query.shape))


@settings(max_examples=40, deadline=None)
@given(grids, st.integers(1, 30))
def test_bisection_cuts_boxes_of_one_size(grid, block):
    """Every block is a box, but for the planes that a cut goes through."""
    layout = TokenLayout(grid)
    order = bisection_order(layout, block, (1, 1, 1)).query
    for part in order.split(block)[:-1]:
        at = layout.coordinates[part].long()
        extent = at.amax(0) - at.amin(0) + 1
        assert len(part) == block
        assert int(extent.prod()) <= 8 * block


def test_bisection_is_tiles_where_the_grid_divides():
    layout = TokenLayout((4, 8, 8))
    order = bisection_order(layout, 32, (2, 4, 4)).query
    for part in order.split(32):
        at = layout.coordinates[part].long()
        assert (at.amax(0) - at.amin(0)).tolist() == [1, 3, 3]


def test_morton_interleaves_the_bits():
    layout = TokenLayout((2, 4, 4))
    at = layout.coordinates[morton_order(layout).query[:9]].tolist()
    first = [[0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]]
    assert at == [*first, [0, 0, 2]]


@settings(max_examples=60, deadline=None)
@given(grids)
def test_the_hilbert_curve_goes_from_token_to_touching_token(grid):
    layout = TokenLayout(grid)
    order = hilbert_order(layout).query
    assert int(order[0]) == 0
    steps = layout.coordinates[order].long().diff(dim=0).abs()
    assert (steps.amax(-1) <= 1).all()
    if all(side & (side - 1) == 0 for side in grid):
        assert (steps.sum(-1) == 1).all()


@pytest.mark.parametrize("grid", [(21, 30, 52), (13, 30, 45)])
def test_the_hilbert_curve_keeps_blocks_compact_at_published_sizes(grid):
    layout = TokenLayout(grid, 226, "after")
    order = hilbert_order(layout).validate()
    at = layout.coordinates[order.query[: layout.video]].long()
    assert (at.diff(dim=0).abs().sum(-1) > 1).double().mean() < 0.01
    blocks = at[: layout.video // 128 * 128].unflatten(0, (-1, 128))
    extents = (blocks.amax(1) - blocks.amin(1) + 1).double()
    assert extents.prod(-1).median() <= 512
    raster = layout.coordinates[: len(blocks) * 128].long().unflatten(0, (-1, 128)).double()
    assert extents.amax(-1).mean() < 0.4 * (raster.amax(1) - raster.amin(1) + 1).amax(-1).mean()


def test_axes_run_in_the_order_named():
    layout = TokenLayout((2, 3, 4))
    order = axes_order(layout, ("fhw", "hwf"))
    assert order.query[0, 0].tolist() == list(range(24))
    assert layout.coordinates[order.query[0, 1, :3]].tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_neighbours_in_the_gray_code_differ_in_one_bit():
    codes = torch.cartesian_prod(*[torch.tensor([False, True])] * 5)
    rank = gray_rank(codes)
    assert sorted(rank.tolist()) == list(range(32))
    ordered = codes[rank.argsort()].int()
    assert (ordered.diff(dim=0).abs().sum(-1) == 1).all()


def test_hotness_is_the_attention_that_the_mean_queries_pay():
    layout = TokenLayout((1, 6, 6))
    q, k, _ = tensors(layout)
    means = torch.stack([part.mean(2) for part in q.split(8, 2)], 2)
    expected = (means @ k.transpose(-1, -2) / 4).softmax(-1).sum(2)
    torch.testing.assert_close(hotness(q, k, Blocking.uniform(36, 8)), expected)


@pytest.mark.parametrize(("segment", "share"), [(None, 1.0), (10, 1.0), (None, 0.25), (10, 0.3)])
def test_hot_keys_come_first_in_their_segment(segment, share):
    layout = TokenLayout((1, 5, 7), 4, "after")
    q, k, _ = tensors(layout)
    order = hot_key_order(q, k, layout, 8, segment, share).validate()
    assert torch.equal(order.query, torch.arange(39))
    video = order.key_index[..., :35]
    heat = hotness(q[:, :, :35], k[:, :, :35], Blocking.uniform(35, 8))
    size = segment or 35
    for start in range(0, 35 // size * size, size):
        run, hot = video[..., start : start + size], round(share * size)
        assert torch.equal(run.sort(-1).values, torch.arange(start, start + size).expand_as(run))
        assert (heat.gather(2, run)[..., :hot].diff(dim=-1) <= 0).all()
        assert (run[..., hot:].diff(dim=-1) > 0).all() or share == 1
    assert (video[..., 35 // size * size :] == torch.arange(35 // size * size, 35)).all()


def test_scattered_stripes_need_fewer_blocks_after_sorting():
    """Keys that all queries attend, scattered over the sequence: after sorting they fill the first blocks."""
    layout = TokenLayout((1, 16, 16))
    q, k, _ = tensors(layout)
    hot = torch.arange(5, 256, 16)
    q, k[:, :, hot] = q + 3, k[:, :, hot] + 3
    order = hot_key_order(q, k, layout, 16, None, 1.0)
    assert torch.equal(order.key_index[0, 0, :16].sort().values, hot)


def test_like_tokens_share_a_hash_and_equal_ones_keep_their_order():
    layout = TokenLayout((1, 8, 8))
    q, k, _ = tensors(layout)
    k = k[:, :, :1].expand_as(k)
    order = lsh_order(q, k, layout, 7, seed=0).validate()
    assert (order.key_index == torch.arange(64)).all()
    again = lsh_order(2 * q, k, layout, 7, seed=0)
    assert torch.equal(order.query, again.query)
    assert not torch.equal(order.query, lsh_order(q, k, layout, 7, seed=1).query)


def test_clusters_are_found_and_their_centroids_carried_over():
    layout = TokenLayout((1, 8, 8))
    true = torch.arange(64) % 4
    x = 10 * torch.randn(4, 16, generator=torch.Generator().manual_seed(0))[true] + tensors(layout)[0]
    start = (x[:, :, :4], x[:, :, :4])  # one token of each
    order, centroids = kmeans_order(x, x, layout, 4, 3, start, torch.Generator())
    groups = true[order.validate().query].unflatten(-1, (4, 16))
    assert (groups == groups[..., :1]).all()
    again, same = kmeans_order(x, x, layout, 4, 1, centroids, torch.Generator())
    assert torch.equal(again.query, order.query)
    torch.testing.assert_close(same, centroids)


def test_clusters_stand_in_the_order_of_the_centroids_that_a_call_gives_back():
    layout = TokenLayout((2, 8, 8))
    q, k, _ = tensors(layout)
    _, centroids = kmeans_order(q, k, layout, 9, 2, None, torch.Generator())
    order, _ = kmeans_order(q, k, layout, 9, 1, centroids, torch.Generator())
    for x, index, places in zip((q, k), (order.query, order.key_index), centroids, strict=True):
        nearest = torch.cdist(x, places).argmin(-1).gather(-1, index)
        assert (nearest.diff(dim=-1) >= 0).all()


def test_tokens_of_a_cluster_stand_by_how_near_they_are_to_the_clusters_beside_theirs():
    layout = TokenLayout((2, 8, 8), 5, "before")
    q, k, _ = tensors(layout)
    _, start = kmeans_order(q, k, layout, 6, 2, None, torch.Generator())
    order, centroids = kmeans_order(q, k, layout, 6, 1, start, torch.Generator())
    for x, index, old, new in zip((q, k), (order.query, order.key_index), start, centroids, strict=True):
        for head in range(2):
            tokens = x[0, head, index[0, head, 5:]]
            owner = torch.cdist(tokens, old[0, head]).argmin(-1)
            for cluster in range(6):
                before, after = (new[0, head, min(max(cluster + step, 0), 5)] for step in (-1, 1))
                assert ((tokens[owner == cluster] @ (after - before)).diff() >= -1e-5).all()


def test_an_order_is_kept_for_as_many_steps_as_asked():
    layout = TokenLayout((2, 8, 8))
    method, memory = get_method("composed", order="kmeans", clusters=5, renew=3), {}

    def order(step, of=layout, batch=1):
        x = tensors(of, batch=batch, seed=step)
        return method.order(*x, CallContext(of, step=step, memory=memory)).validate()

    first, second, third, fourth = (order(step) for step in (4, 5, 6, 7))
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.key_index, third.key_index)
    assert not torch.equal(first.query, fourth.query)
    assert torch.equal(order(9).query, fourth.query)
    assert order(9, batch=2).query.shape[0] == 2
    assert order(9, TokenLayout((1, 3, 5))).query.shape[-1] == 15


def test_padded_video_tokens_are_in_no_cluster_and_stay_last():
    layout = TokenLayout((2, 6, 4), valid=(41, 48))
    q, k, _ = tensors(layout, batch=2)
    orders = []
    for filling in (0.0, torch.nan):
        q[0, :, 41:], k[0, :, 41:] = filling, filling
        orders.append(kmeans_order(q, k, layout, 4, 2, None, torch.Generator().manual_seed(0))[0].validate())
    assert torch.equal(orders[0].query, orders[1].query)
    assert torch.equal(orders[0].key_index, orders[1].key_index)
    assert (orders[0].key_index[0, :, 41:] >= 41).all()
    assert (orders[0].query[0, :, 41:] >= 41).all()


def test_more_clusters_than_tokens():
    layout = TokenLayout((1, 2, 3))
    q, k, _ = tensors(layout)
    kmeans_order(q, k, layout, 50, 2, None, torch.Generator())[0].validate()
