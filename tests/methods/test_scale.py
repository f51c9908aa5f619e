"""A factor on the logits of one's own reaches all that a method computes, and not the kernel alone."""

from __future__ import annotations

import pytest
import torch
from method_cases import tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext

LAYOUT = TokenLayout((4, 8, 8), 6, "after")
COMPLETING = {
    "re_ttention": {"density": 0.2, "block": 8},
    "composed": {"order": "raster", "block": 16, "density": 0.3, "remainder": "history"},
    "rectified": {"block": 16, "density": 0.3},
    "llsa": {"block": 4, "keep": 2},
    "psa": {"block": 16, "key_block": 16, "ends": [0.2, 0.4, 0.6, 0.9]},
    "clear": {"radius": 2.0, "tile": [1, 4, 4], "remainder": "pooled"},
}


def outputs(name, q, k, v, scale, plan=None):
    """Outputs of two steps in the raster, and the plan that both took: `plan`, or that of the first step."""
    method, memory, outs = get_method(name, **COMPLETING[name]), {}, []
    for step in (5, 6):
        call = CallContext(LAYOUT, step=step, memory=memory)
        order, made = method.plan(LAYOUT, q, k, v, call)
        plan = made if plan is None else plan
        ordered = (q, k, v) if order is None else order.apply(q, k, v)
        out = method.compute(*ordered, plan, call, scale)
        outs.append(out if order is None else order.restore(out))
    return outs, plan


@pytest.mark.parametrize("name", sorted(COMPLETING))
def test_queries_and_scale_count_by_their_product_alone(name):
    q, k, v = tensors(LAYOUT)
    assert get_method(name, **COMPLETING[name]).completes
    first, plan = outputs(name, q, k, v, 0.5)
    second, _ = outputs(name, 4 * q, k, v, 0.125, plan)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", ["re_ttention", "composed"])
def test_history_repeats_dense_attention_at_any_scale(name):
    q, k, v = tensors(LAYOUT)
    method, memory = get_method(name, **{**COMPLETING[name], "ramp": 0.0}), {}
    for step in (5, 6):
        call = CallContext(LAYOUT, step=step, memory=memory)
        plan = method.plan(LAYOUT, q, k, v, call)[1]
        out = method.compute(q, k, v, plan, call, 0.6)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=0.6))
