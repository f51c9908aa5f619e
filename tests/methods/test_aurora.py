"""Aurora: each part must pay on smooth data, and what breaks careless arithmetic must not break it."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.samples.captured_attention import synthetic

FIELDS = {call.name: call for call in synthetic()}


def error(call, **parameters):
    exact = F.scaled_dot_product_attention(*(x.double() for x in call.qkv))
    out = attend(get_method("aurora", **parameters), call.layout, *call.qkv)
    assert out.isfinite().all()
    return float((out - exact).norm() / exact.norm())


# The synthetic fields vary alike along all three axes; the default boxes are long rows.
CUBES = {"tile": [2, 4, 8]}


@pytest.mark.parametrize("name", FIELDS)
def test_it_is_finite_and_never_worse_than_dropping(name):
    assert error(FIELDS[name], **CUBES) <= error(FIELDS[name], remainder="drop", **CUBES) + 1e-5


@pytest.mark.parametrize("name", FIELDS)
def test_without_a_first_order_term_it_never_loses_to_dropping_in_boxes_that_do_not_fit(name):
    assert error(FIELDS[name], remainder="pooled") < error(FIELDS[name], remainder="drop")


def test_large_logits_in_boxes_that_do_not_fit_are_finite():
    call = FIELDS["logits to 80"]
    assert error(call) < 1


def test_equal_keys_are_exact():
    assert error(FIELDS["equal keys"]) < 1e-5


def test_it_beats_piecewise_sparse_attention_on_a_smooth_field():
    call = FIELDS["smooth"]
    exact = F.scaled_dot_product_attention(*call.qkv)
    published = attend(get_method("pisa"), call.layout, *call.qkv)
    assert error(call, **CUBES) < 0.6 * float((published - exact).norm() / exact.norm())


@pytest.mark.parametrize("other", [{"about": "key"}, {"remainder": "pooled"}, {"order": "raster"}], ids=str)
def test_without_one_of_its_parts_it_is_worse_on_a_smooth_field(other):
    assert error(FIELDS["smooth"], **CUBES) < error(FIELDS["smooth"], **{**CUBES, **other})


def test_blocks_go_to_the_heads_that_need_them():
    calm, wild = (torch.randn(1, 1, 512, 16, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    q, k, v = (torch.cat([0.05 * calm, 1.5 * wild.roll(shift, 2)], 1) for shift in (0, 3, 7))
    layout = TokenLayout((2, 16, 16))
    _, plan = get_method("aurora", density=0.25, block=16).plan(layout, q, k, v)
    share = plan.density_per_head().flatten()
    assert share[0] < 0.5 * share[1]
    assert float(plan.density) <= 0.25 + 1e-6
    assert (plan.counts >= 1).all()


@pytest.mark.parametrize("text", [0, 13])
def test_full_density_is_dense(text):
    layout = TokenLayout((3, 5, 7), text, "before" if text else "none")
    q, k, v = tensors(layout, batch=2)
    out = attend(get_method("aurora", density=1.0, block=16), layout, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("tokens", [63, 64, 65, 127, 129])
def test_fast_path_and_specification_agree_around_the_block_size(tokens):
    layout = TokenLayout((1, 1, tokens))
    q, k, v = (x.double() for x in tensors(layout))
    fast, exact = (attend(get_method("aurora", block=16), layout, q, k, v, name) for name in ("torch", "reference"))
    torch.testing.assert_close(fast, exact, atol=1e-10, rtol=1e-9)
