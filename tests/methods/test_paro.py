"""PAROAttention (arXiv 2506.16054): the cost of an order of the axes, and the plan from a recorded map."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.axis_choice import AXES, axis_costs, best_axes, recall_plan, tile_costs
from dit_accel.orders.space import axes_order
from dit_accel.selection.scores import block_mass

LAYOUT = TokenLayout((4, 4, 8), 5, "before")


def along(axis, layout=LAYOUT):
    """q and k of a head whose queries attend the tokens that differ from them along one axis alone."""
    others = [place for place in range(3) if place != axis]
    at = layout.coordinates.long()[:, others]
    code = 20 * torch.cat([F.one_hot(at[:, 0], 8), F.one_hot(at[:, 1], 8)], -1).float()
    q, k, v = tensors(layout, heads=1)
    q[:, :, layout.video_slice()] = code
    k[:, :, layout.video_slice()] = code
    return q, k, v


@pytest.mark.parametrize(("axis", "letter"), [(0, "f"), (1, "h"), (2, "w")])
def test_a_head_that_attends_along_an_axis_gets_it_innermost(axis, letter):
    q, k, _ = along(axis)
    costs = axis_costs(q, k, LAYOUT, block=8)
    assert best_axes(costs)[0].endswith(letter)
    assert costs.shape == (1, 6)


@pytest.mark.parametrize("block", [8, 7])
def test_costs_are_those_of_the_map(block):
    q, k, _ = tensors(TokenLayout((1, 5, 8)))
    weights = (3 * q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1)
    empty, uneven = tile_costs(3 * q, k, block, epsilon=1e-2, share=0.8)
    tiles = [part for rows in weights.split(block, 2) for part in rows.split(block, 3)]
    share = torch.stack([((t < 1e-2).double().mean((-1, -2)) >= 0.8).double() for t in tiles]).mean(0)
    ratio = torch.stack([t.amax((-1, -2)) / t.mean((-1, -2)) for t in tiles]).mean(0)
    torch.testing.assert_close(empty, share)
    torch.testing.assert_close(uneven, ratio)


def test_a_constant_map_is_perfectly_even():
    q, k, _ = tensors(TokenLayout((1, 4, 8)))
    torch.testing.assert_close(tile_costs(0 * q, k, 8)[1], torch.ones(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_the_plan_reaches_its_density_and_keeps_text_and_itself(density):
    q, k, _ = tensors(LAYOUT)
    blocks = LAYOUT.blocks(8)
    plan = recall_plan(block_mass(q, k, blocks, blocks, LAYOUT)[0], density, blocks, LAYOUT).validate()
    mask = plan.to_mask()
    assert mask[..., 0, :].all()
    assert mask[..., :, 0].all()
    assert mask.diagonal(dim1=-2, dim2=-1).all()
    share = mask[..., 1:, :].double().mean((-1, -2))
    assert (share <= density + 1e-9).all()
    assert (share > density - 0.08).all()


def test_a_saved_plan_runs_and_one_of_another_shape_is_refused(tmp_path):
    q, k, v = along(0)
    order = axes_order(LAYOUT, ("whf",))
    x = order.apply(q, k, v)
    blocks = LAYOUT.blocks(8)
    path = tmp_path / "plan.safetensors"
    recall_plan(block_mass(x[0], x[1], blocks, blocks, LAYOUT)[0], 0.3, blocks, LAYOUT).save(path)
    method = get_method("paro", axes="whf", block=8, plan_file=str(path))
    dense = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend(method, LAYOUT, q, k, v), dense, atol=1e-4, rtol=1e-3)
    fitting, raster = (
        (attend(get_method("paro", axes=axes, block=8, density=0.15), LAYOUT, q, k, v) - dense).norm()
        for axes in ("whf", "fhw")
    )
    assert fitting < 0.01 * raster
    with pytest.raises(ConfigError, match="a plan is for one geometry"):
        attend(get_method("paro", block=16, plan_file=str(path)), LAYOUT, q, k, v)


@pytest.mark.parametrize("axes", AXES)
def test_every_order_is_dense_at_full_density(axes):
    q, k, v = tensors(LAYOUT)
    out = attend(get_method("paro", axes=axes, density=1.0, block=8), LAYOUT, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_orders_are_counted_against_the_heads():
    q, k, v = tensors(LAYOUT)
    with pytest.raises(ConfigError, match="expected 1 or 2 orders, got 3"):
        attend(get_method("paro", axes=["fhw", "whf", "hwf"]), LAYOUT, q, k, v)


def test_the_emptier_the_tiles_of_an_order_the_better():
    layout = TokenLayout((4, 4, 8))
    q, k, _ = tensors(layout)
    q = 4 * q + 6 * torch.sin(
        layout.coordinates.float() @ torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    )
    weights, empty = (q.double() @ k.double().transpose(-1, -2) / 4).softmax(-1), []
    for axes in AXES:
        grid = torch.arange(128).view(layout.grid)
        index = grid.permute(*("fhw".index(axis) for axis in axes)).flatten()
        tiles = weights[:, :, index][..., index].unflatten(-1, (16, 8)).unflatten(2, (16, 8))
        empty.append(((tiles < 1e-3).double().mean((3, 5)) >= 0.9).double().mean((2, 3))[0])
    full = 1 - torch.stack(empty, -1)
    costs = axis_costs(q, k, layout, block=8)
    torch.testing.assert_close(costs, full / full.sum(-1, keepdim=True))
    assert [AXES[i] for i in torch.stack(empty, -1).argmax(-1)] == list(best_axes(costs))


@pytest.mark.parametrize("axes", AXES)
def test_rows_of_text_do_not_see_the_order(axes):
    q, k, v = tensors(LAYOUT)
    out = attend(get_method("paro", axes=axes, density=0.3, block=8), LAYOUT, q, k, v)
    torch.testing.assert_close(out[:, :, :5], F.scaled_dot_product_attention(q, k, v)[:, :, :5])
    assert not torch.equal(out[:, :, 5:], F.scaled_dot_product_attention(q, k, v)[:, :, 5:])
