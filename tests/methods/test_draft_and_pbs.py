"""DraftAttention (arXiv 2505.14708) and PBS-Attn (arXiv 2510.21270): patches, one budget per head, sorted keys."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext


def test_draft_keeps_the_largest_entries_of_the_pooled_map_of_a_head():
    layout = TokenLayout((3, 16, 32))
    q, k, v = tensors(layout)
    method = get_method("draft", density=0.3, keep_self=False)
    order, plan = method.plan(layout, q, k, v)
    pooled = (x.unflatten(2, layout.grid).unflatten(4, (2, 16)).unflatten(3, (2, 8)).mean((4, 6)) for x in (q, k))
    queries, keys = (x.flatten(2, 4) for x in pooled)
    shares = (queries @ keys.transpose(-1, -2) / 4).softmax(-1)
    best = shares.flatten(-2).topk(43, dim=-1).indices
    expected = torch.zeros(1, 2, 144, dtype=torch.bool).scatter_(-1, best, True).unflatten(-1, (12, 12))
    expected |= torch.zeros_like(expected).scatter_(-1, shares.argmax(-1, keepdim=True), True)
    assert torch.equal(plan.to_mask(), expected)
    patch = layout.coordinates[order.query[:128]].long()
    assert (patch.amax(0) - patch.amin(0)).tolist() == [0, 7, 15]


def test_draft_runs_on_grids_that_patches_do_not_divide_and_leaves_no_row_empty():
    layout = TokenLayout((2, 9, 19), 5, "after")
    q, k, v = tensors(layout)
    method = get_method("draft", density=0.05)
    assert method.plan(layout, q, k, v)[1].validate().counts.min() >= 2  # itself and text
    constant = attend(method, layout, q, k, torch.ones_like(v))
    torch.testing.assert_close(constant, torch.ones_like(v))


def test_draft_finds_attention_that_stays_in_its_patch():
    layout = TokenLayout((2, 16, 32))
    q, k, v = (x.double() for x in tensors(layout))
    patch = layout.coordinates.long() // torch.tensor([1, 8, 16])
    index = patch[:, 0] * 4 + patch[:, 1] * 2 + patch[:, 2]
    far = 30 * F.one_hot(index, 16).double()
    out = attend(get_method("draft", density=1 / 8), layout, q + far, k + far, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q + far, k + far, v))


def test_pbs_drops_exactly_what_its_blocks_leave_out():
    layout = TokenLayout((2, 8, 16), 9, "after", valid=(260,))
    q, k, v = tensors(layout)
    method = get_method("pbs", block=16, segment=64)
    order, plan = method.plan(layout, q, k, v)
    mask = plan.to_token_mask()
    raster = torch.zeros(1, 2, 265, 265, dtype=torch.bool)
    raster.scatter_(-1, order.key_index.unsqueeze(-2).expand(1, 2, 265, 265), mask.expand(1, 2, 265, 265))
    out = attend(method, layout, q, k, v)[:, :, :260]
    torch.testing.assert_close(out, masked(layout, q, k, v, raster)[:, :, :260])


def test_pbs_needs_fewer_blocks_where_stripes_are_scattered():
    layout = TokenLayout((1, 16, 16))
    q, k, v = tensors(layout)
    hot = torch.arange(5, 256, 16)
    q, k[:, :, hot] = q + 1, k[:, :, hot] + 2
    sorted_, raster = (
        get_method("pbs", block=16, order=order, segment=None).plan(layout, q, k, v)[1].density
        for order in ("hot_keys", "raster")
    )
    assert sorted_ < 0.5 * raster


def test_hot_blocks_in_front_are_attended_by_all():
    layout = TokenLayout((1, 16, 16))
    q, k, v = tensors(layout)
    method = get_method("pbs", block=16, segment=None, hot_share=0.125, density=0.05, mass=None)
    assert method.plan(layout, q, k, v)[1].to_mask()[..., :2].all()


@pytest.mark.parametrize(("name", "rule"), [("draft", {"density": 1.0}), ("pbs", {"mass": 1.0})])
def test_all_blocks_are_dense_attention(name, rule):
    layout = TokenLayout((2, 9, 19), 5, "after")
    q, k, v = tensors(layout, batch=2)
    torch.testing.assert_close(
        attend(get_method(name, **rule), layout, q, k, v), F.scaled_dot_product_attention(q, k, v)
    )


def test_keys_that_are_equal_stay_where_they_are():
    layout = TokenLayout((1, 8, 8))
    q, k, _ = tensors(layout)
    order = get_method("pbs", block=8, segment=None).order(q, torch.zeros_like(k), k, CallContext(layout))
    assert (order.key_index == torch.arange(64)).all()
