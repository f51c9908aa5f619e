"""SLA (arXiv 2509.24006) and LLSA (arXiv 2512.16615) against their definitions."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from safetensors.torch import save_file
from torch.nn import functional as F

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.space import morton_order
from dit_accel.remainders.linear_branch import linear_attention
from dit_accel.state import CallContext

LAYOUT = TokenLayout((2, 5, 7), 9, "after", valid=(75,))


def saved(path, weight, bias, layer=0):
    save_file({f"blocks.{layer}.attn1.proj_l.weight": weight, f"blocks.{layer}.attn1.proj_l.bias": bias}, path)
    return str(path)


@pytest.mark.parametrize("over", ["unselected", "all"])
def test_the_linear_branch_is_attention_with_a_feature_map(over):
    q, k, v = (x.double() for x in tensors(LAYOUT))
    plan = get_method("sla", block=8, density=0.3).plan(LAYOUT, q, k, v)[1]
    weights = q.softmax(-1) @ k.softmax(-1).transpose(-1, -2)
    weights[..., 75:] = 0
    if over == "unselected":
        weights = weights * ~plan.to_token_mask()
    total = weights.sum(-1, keepdim=True)
    expected = torch.where(total > 0, weights @ v / total.clamp(min=1e-30), 0.0)
    tolerance = 1e-12 if over == "unselected" else 1e-4  # the published denominator over all keys has 1e-5 added
    out = linear_attention(q, k, v, plan, LAYOUT, over)
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)


def test_without_projections_it_is_its_sparse_part_and_zero_ones_change_nothing(tmp_path):
    q, k, v = tensors(LAYOUT)
    plain = attend(get_method("sla", block=8), LAYOUT, q, k, v)
    dropped = get_method(
        "composed", order="raster", block=8, density=0.1, rounding="floor", keep_self=False, remainder="drop"
    )
    torch.testing.assert_close(plain, attend(dropped, LAYOUT, q, k, v))
    path = saved(tmp_path / "zero.safetensors", torch.zeros(16, 16), torch.zeros(16))
    torch.testing.assert_close(attend(get_method("sla", block=8, projections=path), LAYOUT, q, k, v), plain)


def test_trained_projections_are_applied(tmp_path):
    q, k, v = tensors(LAYOUT)
    weight, bias = torch.randn(16, 16), torch.randn(16)
    path = saved(tmp_path / "some.safetensors", weight, bias)
    method = get_method("sla", block=8, projections=path, over="unselected")
    plan = method.plan(LAYOUT, q, k, v)[1]
    branch = linear_attention(q, k, v, plan, LAYOUT, "unselected")
    expected = attend(get_method("sla", block=8), LAYOUT, q, k, v) + F.linear(branch, weight, bias)
    torch.testing.assert_close(attend(method, LAYOUT, q, k, v), expected)
    with pytest.raises(ConfigError, match="projection for layer 3"):
        attend(method, LAYOUT, q, k, v, call=CallContext(LAYOUT, layer=3))


def test_a_file_without_projections_is_refused(tmp_path):
    save_file({"blocks.0.weight": torch.zeros(2)}, tmp_path / "none.safetensors")
    q, k, v = tensors(LAYOUT)
    with pytest.raises(ConfigError, match=r"proj_l\.weight"):
        attend(get_method("sla", projections=str(tmp_path / "none.safetensors")), LAYOUT, q, k, v)


def test_sla_selection_ignores_a_vector_added_to_all_keys():
    layout = TokenLayout((1, 8, 8))
    q, k, v = (x.double() for x in tensors(layout))
    once, again = (get_method("sla", block=8, density=0.3).plan(layout, q, x, v)[1] for x in (k, k + 2))
    assert torch.equal(once.to_mask(), again.to_mask())


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout((3, 6, 7))])
def test_llsa_covers_every_key_once(layout):
    q, k, v = tensors(layout)
    real = layout.tokens if layout.valid is None else layout.valid[0]
    method = get_method("llsa", block=4, keep=2)
    plan = method.plan(layout, q, k, v)[1]
    assert 0 < plan.density < 0.6
    constant = attend(method, layout, q, k, torch.full_like(v, 3.0))
    torch.testing.assert_close(constant[:, :, :real], torch.full_like(constant[:, :, :real], 3.0))
    zero = attend(method, layout, 0 * q, k, v)[:, :, :real]
    torch.testing.assert_close(zero, v[:, :, :real].mean(2, keepdim=True).expand_as(zero))


def test_llsa_is_exact_where_the_keys_of_each_coarse_node_are_equal():
    layout = TokenLayout((4, 8, 8))
    q, k, v = tensors(layout)
    order = morton_order(layout)
    ordered = order.apply(q, k, v)[1][:, :, ::16].repeat_interleave(16, dim=2)
    k = order.restore(ordered)
    torch.testing.assert_close(
        attend(get_method("llsa", block=4, keep=2), layout, q, k, v), F.scaled_dot_product_attention(q, k, v)
    )


def test_llsa_with_everything_kept_is_dense():
    q, k, v = tensors(LAYOUT)
    out = attend(get_method("llsa", block=4, keep=64), LAYOUT, q, k, v)[:, :, :75]
    exact = F.scaled_dot_product_attention(q, k[:, :, :75], v[:, :, :75])[:, :, :75]
    torch.testing.assert_close(out, exact)


@pytest.mark.parametrize("levels", [1, 2])
def test_llsa_keeps_conditioning_frames_whole_beyond_its_count(levels):
    layout = TokenLayout((4, 6, 7), 5, "after", prefix_frames=1)
    q, k, v = tensors(layout)
    method = get_method("llsa", block=4, keep=2, levels=levels)
    order, plan = method.plan(layout, q, k, v)
    owner = plan.k_blocks.block_of_token()
    leading = owner[order.inverse[:42]].unique()
    assert len(leading) > 2
    assert plan.to_mask()[..., leading].all()
    assert plan.density < 0.9
    constant = attend(method, layout, q, k, torch.full_like(v, 3.0))
    torch.testing.assert_close(constant, torch.full_like(constant, 3.0))


def test_llsa_with_one_level_is_pisa_of_order_zero():
    layout = TokenLayout((2, 8, 8))
    q, k, v = tensors(layout)
    method = get_method("llsa", block=8, keep=3, levels=1)
    same = get_method(
        "pisa", order="morton", block=8, density=3 / 16, rounding="round", remainder="pooled", keep_self=True
    )
    torch.testing.assert_close(attend(method, layout, q, k, v), attend(same, layout, q, k, v))


def test_llsa_chooses_from_coarse_to_fine():
    layout = TokenLayout((1, 8, 16))
    q, k, v = tensors(layout)
    order, plan = get_method("llsa", block=4, keep=2).plan(layout, q, k, v)
    ordered_q, ordered_k, _ = order.apply(q, k, v)
    coarse_q, coarse_k, fine_q, fine_k = (
        x.unflatten(2, (-1, size)).mean(3) for size in (16, 4) for x in (ordered_q, ordered_k)
    )
    coarse = (coarse_q @ coarse_k.transpose(-1, -2)).masked_fill(torch.eye(8, dtype=torch.bool), torch.inf)
    for row in range(32):
        nodes = coarse[0, 0, row // 4].topk(2).indices
        children = torch.cat([torch.arange(4 * n, 4 * n + 4) for n in nodes.tolist()])
        scores = fine_q[0, 0, row] @ fine_k[0, 0, children].T
        scores[children == row] = torch.inf
        expected = set(children[scores.topk(2).indices].tolist())
        assert set(plan.to_mask()[0, 0, row].nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("over", ["unselected", "all"])
def test_the_weights_of_the_linear_branch_sum_to_one(over):
    q, k, v = (x.double() for x in tensors(LAYOUT))
    plan = get_method("sla", block=8, density=0.3).plan(LAYOUT, q, k, v)[1]
    out = linear_attention(q, k, torch.ones_like(v), plan, LAYOUT, over)[:, :, :70]
    rest = (~plan.to_token_mask()[:, :, :70, :75]).any(-1, keepdim=True) if over == "unselected" else True
    torch.testing.assert_close(
        out, torch.where(torch.as_tensor(rest), 1.0, 0.0).double().expand_as(out), atol=1e-5, rtol=0
    )


def test_sla_with_everything_selected_is_dense_whatever_was_trained(tmp_path):
    layout = TokenLayout((2, 5, 7))
    q, k, v = tensors(layout)
    path = saved(tmp_path / "some.safetensors", torch.randn(16, 16), torch.zeros(16))
    method = get_method("sla", block=8, density=1.0, projections=path, over="unselected")
    torch.testing.assert_close(attend(method, layout, q, k, v), F.scaled_dot_product_attention(q, k, v))


def test_llsa_finds_the_best_blocks_where_scores_are_those_of_the_coarse_nodes():
    layout = TokenLayout((1, 8, 16))
    q, k, v = tensors(layout)
    order = morton_order(layout)
    ordered = (x[:, :, ::16].repeat_interleave(16, dim=2) for x in order.apply(q, k, v)[:2])
    q, k = (order.restore(x) for x in ordered)
    plan = get_method("llsa", block=4, keep=3).plan(layout, q, k, v)[1]
    q, k, _ = order.apply(q, k, v)
    scores = (q @ k.transpose(-1, -2))[:, :, ::4, ::4]
    own = torch.eye(32, dtype=torch.bool)
    best = scores.masked_fill(own, torch.inf).topk(3).values[..., 1:]
    kept = scores.masked_fill(~plan.to_mask() | own, -torch.inf).topk(2).values
    assert plan.to_mask()[..., own].all()
    torch.testing.assert_close(kept, best)
