"""The composed method: any order, selection and remainder against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.selection import block_means
from dit_accel.tiling import tile_blocks, tile_order


def tensors(layout, batch=1, heads=2, dim=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, layout.tokens, dim, generator=generator) for _ in range(3))


def attend(method, layout, q, k, v, backend="torch"):
    order, plan = method.plan(layout, q, k, v)
    ordered = (q, k, v) if order is None else order.apply(q, k, v)
    kv_len = None if layout.valid is None else torch.tensor(layout.valid)
    out = block_attention(*ordered, plan.validate(), remainder=method.remainder, kv_len=kv_len, backend=backend)
    return out if order is None else order.restore(out)


grids = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(grids, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), st.integers(0, 9))
def test_tiles_partition_any_grid(grid, tile, text):
    layout = TokenLayout(grid, text, "before" if text else "none")
    order, blocks = tile_order(layout, tile).validate(), tile_blocks(layout, tile)
    owner = blocks.block_of_token()
    for block in range(blocks.count):
        tokens = order.query[owner == block] - layout.video_start
        if bool(layout.text_blocks(blocks)[block]):
            continue
        at = layout.coordinates[tokens].long() // torch.tensor(tile)
        assert (at == at[0]).all()


@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("remainder", ["drop", "mean", "diagonal"])
@pytest.mark.parametrize("position", ["none", "before", "after"])
def test_full_density_is_dense_attention(order, remainder, position):
    layout = TokenLayout((3, 5, 7), 0 if position == "none" else 11, position)
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", order=order, remainder=remainder, density=1.0, block=16, tile=[2, 2, 4])
    torch.testing.assert_close(attend(method, layout, q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("remainder", ["drop", "diagonal"])
def test_fast_and_reference_agree_at_any_density(order, remainder):
    layout = TokenLayout((3, 5, 7), 11, "after", valid=(116, 109))
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", order=order, remainder=remainder, density=0.3, block=16, tile=[2, 2, 4])
    fast, exact = (attend(method, layout, q, k, v, backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(fast, exact, atol=2e-6, rtol=1e-5)


def test_selection_is_top_k_of_the_pooled_mass():
    layout = TokenLayout((4, 4, 4))
    q, k, _ = tensors(layout)
    plan = get_method("composed", order="raster", block=8, density=0.5).plan(layout, q, k)[1]
    pooled = (x.view(1, 2, 8, 8, 16).mean(3) for x in (q, k))
    scores = torch.einsum("bhqd,bhkd->bhqk", *pooled)
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    expected = torch.zeros(1, 2, 8, 8, dtype=torch.bool).scatter_(-1, scores.topk(4).indices, True)
    assert torch.equal(plan.to_mask(), expected)
    assert plan.density == 0.5


def test_padded_text_changes_nothing():
    layout = TokenLayout((2, 4, 4), 9, "after", valid=(35,))
    q, k, v = tensors(layout)
    method = get_method("composed", density=0.3, tile=[2, 2, 2])
    out = attend(method, layout, q, k, v)[:, :, :35]
    k[:, :, 35:], v[:, :, 35:], q[:, :, 35:] = 50.0, torch.nan, -50.0
    torch.testing.assert_close(attend(method, layout, q, k, v)[:, :, :35], out)


def test_sink_frames_are_attended_by_all():
    layout = TokenLayout((5, 4, 4))
    q, k, _ = tensors(layout)
    method = get_method("composed", density=0.01, tile=[1, 4, 4], sink_frames=2)
    mask = method.plan(layout, q, k)[1].to_mask()
    assert mask[..., :2].all()
    assert mask.sum(-1).max() == 3


def test_batch_rows_and_scale_of_scores():
    layout = TokenLayout((3, 5, 7))
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", density=0.3, tile=[2, 2, 4])
    both = attend(method, layout, q, k, v)
    torch.testing.assert_close(both[1:], attend(method, layout, q[1:], k[1:], v[1:]))


def test_a_remainder_is_closer_to_dense_than_dropping():
    layout = TokenLayout((4, 8, 8))
    generator = torch.Generator().manual_seed(0)
    smooth = layout.coordinates.float() / 8
    field = torch.randn(1, 2, 3, 16, generator=generator)
    q, k, v = (torch.sin(smooth @ field) + 0.1 * x for x in tensors(layout))
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = {
        name: (attend(get_method("composed", density=0.1, remainder=name), layout, q, k, v) - dense).norm().item()
        for name in ("drop", "mean", "diagonal")
    }
    assert max(errors["mean"], errors["diagonal"]) < errors["drop"] / 3


def test_block_means_divide_by_the_true_count():
    blocks = TokenLayout((1, 1, 7)).blocks(4)
    x = torch.arange(7.0).view(1, 1, 7, 1)
    means, counts = block_means(x, blocks, valid=(6,))
    assert means.flatten().tolist() == [1.5, 4.5]
    assert counts.flatten().tolist() == [4, 2]


def test_parameters_are_called_by_their_public_names():
    with pytest.raises(ConfigError, match=r"method\.composed\.order"):
        get_method("composed", order="spiral")
    with pytest.raises(ConfigError, match="did you mean 'remainder'"):
        get_method("composed", remaindr="drop")
    method = get_method("composed", order="raster")
    assert get_method("composed", **method.model_dump()) == method


def test_int8_is_asked_of_the_kernel():
    layout = TokenLayout((2, 4, 4))
    q, k, v = tensors(layout)
    method = get_method("composed", precision="int8", density=1.0, tile=[2, 2, 2])
    assert method.precision is not None
    assert method.precision.qk == "int8"
    order, plan = method.plan(layout, q, k, v)
    plain, rounded = (
        order.restore(block_attention(*order.apply(q, k, v), plan, precision=precision))
        for precision in (None, method.precision)
    )
    assert 1e-5 < (plain - rounded).norm() / plain.norm() < 0.05
