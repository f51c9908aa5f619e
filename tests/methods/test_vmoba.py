"""VMoBA: boxes by layer, the own box, and both rules of choice."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.selection import TopP, select_blocks
from dit_accel.state import CallContext

LAYOUT = TokenLayout((5, 6, 8))
SHAPES = {"frames": 2, "window": [3, 4], "box": [2, 3, 4]}


def chosen(layer, q, k, layout=LAYOUT, **parameters):
    """Token mask in raster order, box of each token, and the method."""
    method = get_method("vmoba", **{**SHAPES, "query_block": 1, **parameters})
    call = CallContext(layout, layer=layer)
    order, plan = method.plan(layout, q, k, None, call)
    mask = plan.validate().to_token_mask()[..., order.inverse, :][..., order.inverse]
    tile = torch.tensor(method.tile(call))
    at = layout.coordinates // tile
    return mask, (at[:, 0] * 100 + at[:, 1]) * 100 + at[:, 2]


@pytest.mark.parametrize(("layer", "boxes"), [(0, 3), (1, 4), (2, 12), (3, 3), (7, 4)])
def test_layers_take_turns_and_each_query_sees_k_boxes_its_own_among_them(layer, boxes):
    q, k, _ = cases.tensors(LAYOUT)
    mask, box = chosen(layer, q, k, density=0.5)
    assert len(box.unique()) == boxes
    per_box = torch.stack([mask[..., box == b].any(-1) for b in box.unique()], -1)
    assert torch.equal(per_box, torch.stack([mask[..., box == b].all(-1) for b in box.unique()], -1))
    assert (per_box.sum(-1) == int(boxes / 2 + 0.5)).all()
    assert mask.masked_select(box[:, None] == box).all()


def test_boxes_go_by_the_product_with_their_mean_key():
    q, k, _ = cases.tensors(LAYOUT)
    mask, box = chosen(1, q, k, density=0.5)
    means = torch.stack([k[:, :, box == b].mean(2) for b in box.unique()], 2)
    gate = q @ means.transpose(-1, -2)
    own = torch.searchsorted(box.unique(), box)
    gate.scatter_(-1, own.expand(2, 2, -1).unsqueeze(-1), torch.inf)
    expected = torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, gate.topk(2).indices, True)
    assert torch.equal(mask, expected[..., own])
    assert torch.equal(mask, chosen(1, 9 * q, k, density=0.5)[0])


def test_one_box_is_attention_inside_it():
    q, k, v = cases.tensors(LAYOUT)
    method = get_method("vmoba", **SHAPES, density=0.01)
    out = cases.attend(method, LAYOUT, q, k, v, CallContext(LAYOUT, layer=2))
    _, box = chosen(2, q, k, density=0.01)
    for number in box.unique()[[0, 5, 11]]:
        inside = box == number
        part = torch.nn.functional.scaled_dot_product_attention(*(x[:, :, inside] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, inside], part)


@pytest.mark.parametrize("scope", ["row", "head"])
def test_the_threshold_reaches_its_share_and_is_scale_invariant(scope):
    q, k, _ = cases.tensors(LAYOUT)
    rule = {"density": None, "mass": 0.4, "scope": scope}
    mask, box = chosen(2, q, k, **rule)
    assert torch.equal(mask, chosen(2, 7 * q, k, **rule)[0])
    means = torch.stack([k[:, :, box == b].mean(2) for b in box.unique()], 2)
    gate = q @ means.transpose(-1, -2)
    kept = torch.stack([mask[..., box == b].any(-1) for b in box.unique()], -1)
    axes = -1 if scope == "row" else (-1, -2)
    low, high = gate.amin(axes, keepdim=True), gate.amax(axes, keepdim=True)
    share = (gate - low) / (high - low)
    share = share / share.sum(axes, keepdim=True)
    reached = (share * kept).sum(axes)
    assert (reached >= 0.4 - 1e-6).all()
    assert (reached < 0.75).all()
    if scope == "head":
        assert kept.sum(-1).unique().numel() > 1


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_density_may_be_that_of_a_head_or_a_layer(scope):
    q, k, _ = cases.tensors(LAYOUT)
    q[:, 1] *= 3
    mask, box = chosen(2, q, k, density=0.25, scope=scope)
    numbers = box.unique()
    kept = torch.stack([mask[..., box == number].any(-1) for number in numbers], -1)
    assert mask[..., box[:, None] == box].all()
    total = 3 * LAYOUT.video  # a quarter of twelve boxes for every query, its own among them
    assert (kept.sum((-1, -2)).sum(-1) == 2 * total).all()
    per_head = kept.sum((-1, -2))
    assert (per_head == total).all() == (scope == "head")
    assert kept.sum(-1).unique().numel() > 1
    means = torch.stack([k[:, :, box == number].mean(2) for number in numbers], 2)
    gate = (q @ means.transpose(-1, -2)).masked_fill(box.unsqueeze(-1) == numbers, torch.nan)
    lead = (2, 2, -1) if scope == "head" else (2, 1, -1)
    gate, kept = gate.reshape(lead), kept.reshape(lead)
    worst = gate.masked_fill(~kept, torch.inf).nan_to_num(torch.inf).amin(-1)
    assert (worst >= gate.masked_fill(kept, -torch.inf).nan_to_num(-torch.inf).amax(-1)).all()


def test_a_layer_of_boxes_has_no_classes_of_heads():
    with pytest.raises(ConfigError, match="leave heads at 'uniform'"):
        get_method("vmoba", scope="layer", heads="adaptive")


def test_groups_of_queries_choose_by_their_mean():
    q, k, v = cases.tensors(LAYOUT)
    q = q.unflatten(2, (-1, 8))[..., :1, :].expand(-1, -1, -1, 8, -1).flatten(2, 3)
    one, eight = (
        get_method("vmoba", frames=5, window=[6, 8], box=[1, 1, 8], query_block=n, density=0.3) for n in (1, 8)
    )
    call = CallContext(LAYOUT, layer=2)
    torch.testing.assert_close(cases.attend(one, LAYOUT, q, k, v, call), cases.attend(eight, LAYOUT, q, k, v, call))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("scope", ["row", "head"])
def test_all_of_the_share_is_dense_attention(layer, scope):
    q, k, v = cases.tensors(LAYOUT)
    method = get_method("vmoba", **SHAPES, density=None, mass=1.0, scope=scope)
    out = cases.attend(method, LAYOUT, q, k, v, CallContext(LAYOUT, layer=layer))
    torch.testing.assert_close(out, cases.dense(LAYOUT, q, k, v), atol=2e-6, rtol=1e-5)


def test_without_the_last_box_the_threshold_is_not_reached():
    scores = torch.randn(2, 3, 6, 12, generator=torch.Generator().manual_seed(0)).double()
    mask = select_blocks(scores, TopP(mass=0.4), normalisation="min_max")
    share = scores - scores.amin(-1, keepdim=True)
    share = share / share.sum(-1, keepdim=True)
    best = share.sort(dim=-1, descending=True).values
    needed = (best.cumsum(-1) < 0.4).sum(-1) + 1
    assert torch.equal(mask, share >= best.gather(-1, needed.unsqueeze(-1) - 1))
