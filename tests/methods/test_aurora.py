"""Aurora: each part must pay on smooth data, and what breaks careless arithmetic must not break it."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.samples.captured_attention import synthetic
from dit_accel.state import CallContext

FIELDS = {call.name: call for call in synthetic()}


def error(call, **parameters):
    exact = F.scaled_dot_product_attention(*(x.double() for x in call.qkv))
    out = attend(get_method("aurora", **parameters), call.layout, *call.qkv)
    assert out.isfinite().all()
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", FIELDS)
def test_it_is_finite_and_never_worse_than_dropping(name):
    assert error(FIELDS[name]) <= error(FIELDS[name], remainder="drop") + 1e-5


def test_large_logits_do_not_cost_it_its_lead():
    """Most of the mass of a row may stand on few keys: about the key, the rest is hardly better than dropped."""
    call = FIELDS["logits to 80"]
    assert error(call) < 0.8 * min(error(call, remainder="drop"), error(call, about="key"))


def test_equal_keys_are_exact():
    assert error(FIELDS["equal keys"]) < 1e-5


def test_it_beats_piecewise_sparse_attention_on_a_smooth_field():
    call = FIELDS["smooth"]
    exact = F.scaled_dot_product_attention(*call.qkv)
    published = attend(get_method("pisa"), call.layout, *call.qkv)
    assert error(call) < 0.6 * float((published - exact).norm() / exact.norm())


@pytest.mark.parametrize(
    "other", [{"about": "key"}, {"order": "bisect", "tile": [2, 2, 16]}, {"order": "raster"}, {"clusters": 8}], ids=str
)
def test_without_one_of_its_parts_it_is_worse_on_a_smooth_field(other):
    assert error(FIELDS["smooth"]) < error(FIELDS["smooth"], **other)


def test_an_order_of_earlier_steps_serves_nearly_as_well():
    """Fields of neighbouring steps: the later one is the earlier one, changed by a tenth of its size."""
    method, memory, errors = get_method("aurora"), {}, []
    call = FIELDS["smooth"]
    generator = torch.Generator().manual_seed(5)
    for step in range(2):
        qkv = tuple(x + 0.1 * step * x.std() * torch.randn(x.shape, generator=generator) for x in call.qkv)
        exact = F.scaled_dot_product_attention(*qkv)
        for kept in (memory, {}):
            context = CallContext(call.layout, step=step, branches=kept)
            errors.append(float((attend(method, call.layout, *qkv, call=context) - exact).norm() / exact.norm()))
    assert errors[0] == errors[1]
    assert errors[2] != errors[3]
    assert errors[2] < 1.2 * errors[3]


def test_with_one_budget_per_layer_blocks_go_to_the_heads_that_need_them():
    calm, wild = (torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    q, k, v = (torch.cat([0.05 * calm, 1.5 * wild.roll(shift, 2)], 1) for shift in (0, 3, 7))
    layout = TokenLayout((2, 16, 16))
    _, plan = get_method("aurora", density=0.25, block=16, query_block=16, scope="layer", score="error").plan(
        layout, q, k, v
    )
    share = plan.density_per_head().flatten()
    assert share[0] < 0.5 * share[1]
    assert float(plan.density) <= 0.25 + 1e-6
    assert (plan.counts >= 1).all()


@pytest.mark.parametrize("text", [0, 13])
def test_full_density_is_dense(text):
    layout = TokenLayout((3, 5, 7), text, "before" if text else "none")
    q, k, v = tensors(layout, batch=2)
    out = attend(get_method("aurora", density=1.0, block=16, query_block=32), layout, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 129])
def test_fast_path_and_specification_agree_around_the_block_size(tokens):
    layout = TokenLayout((1, 1, tokens))
    q, k, v = (x.double() for x in tensors(layout))
    fast, exact = (
        attend(get_method("aurora", block=16, query_block=32), layout, q, k, v, name) for name in ("torch", "reference")
    )
    torch.testing.assert_close(fast, exact, atol=1e-10, rtol=1e-9)
