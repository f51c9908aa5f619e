"""The second filter of SpargeAttn: tiles far below the running maximum, left out after their scores are known."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import dynamic_cases as cases
import pytest
import torch

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.kernels import Precision, backends, block_attention
from dit_accel.kernels.attention import request_of
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

LAYOUTS = {name: cases.LAYOUTS[name] for name in ("video", "text after", "one block and one token")}


def filtered(q, k, v, plan, limit, valid):
    """Attention of one head in fp64: blocks in the order of the list, each kept or left out, then one softmax.

    q, k, v `[N, D]`; the limit in units of log 2. Returns the output, and how many blocks were left out.
    """
    out, left_out = torch.zeros_like(v), 0
    scores = (q @ k.T) * q.shape[-1] ** -0.5 / math.log(2)
    for i, rows in enumerate(torch.arange(len(q)).split(plan.q_blocks.lengths.tolist())):
        kept, running = [], torch.full((len(rows),), -torch.inf, dtype=torch.float64)
        for j in plan.indices[i][: plan.counts[i]].tolist():
            first, last = int(plan.k_blocks.starts[j]), int(plan.k_blocks.starts[j + 1])
            columns = torch.arange(first, min(last, valid))
            if len(columns) == 0:
                continue
            largest = scores[rows][:, columns].amax(-1)
            if bool((largest - running > -limit).any()):
                kept.append(columns)
            else:
                left_out += 1
            running = running.maximum(largest)
        if kept:
            chosen = torch.cat(kept)
            out[rows] = (scores[rows][:, chosen] * math.log(2)).softmax(-1) @ v[chosen]
    return out, left_out


def sharp(layout, dim=16):
    """Tensors of which some blocks of keys draw nearly all attention, padding poisoned."""
    q, k, v = cases.tensors(layout, dim=dim)
    q, k = 3 * q.double(), k.double()
    k[:, :, layout.tokens // 3 :] *= 0.1
    if layout.valid is not None:
        for item, real in enumerate(layout.valid):
            k[item, :, real:] = v[item, :, real:] = torch.nan
    return q, k, v.double()


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("limit", [0.0, 2.5])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_the_filter_is_its_definition(layout, limit, backend):
    method = get_method("sparge", density=0.7, block=16, key_block=8, order="raster", pv_threshold=limit)
    q, k, v = sharp(layout)
    order, plan = method.plan(layout, q, k, v)
    assert order is None
    out = method.compute(q, k, v, plan, cases.CallContext(layout), backend=backend)
    total = 0
    for item in range(2):
        real = layout.tokens if layout.valid is None else layout.valid[item]
        for head in range(2):
            of_head = plan_of(plan, item, head)
            expected, left_out = filtered(q[item, head], k[item, head], v[item, head], of_head, limit, real)
            torch.testing.assert_close(out[item, head, :real], expected[:real], atol=1e-10, rtol=1e-9)
            total += left_out
    assert total > 0


def plan_of(plan, item, head):
    """The rows of one head of a plan, with axes `[nq, C]`."""
    at = (min(item, plan.counts.shape[0] - 1), min(head, plan.counts.shape[1] - 1))
    return SimpleNamespace(
        indices=plan.indices[at], counts=plan.counts[at].tolist(), q_blocks=plan.q_blocks, k_blocks=plan.k_blocks
    )


def test_a_limit_bounds_the_error_and_a_large_one_changes_nothing():
    layout = TokenLayout((3, 5, 7))
    q, k, v = sharp(layout)
    parameters = {"density": 1.0, "similarity": -1.0, "block": 16, "key_block": 8}
    dense = cases.dense(layout, q, k, v)
    errors = []
    for limit in (1.0, 4.0, 8.0):
        out = cases.attend(get_method("sparge", pv_threshold=limit, **parameters), layout, q, k, v)
        errors.append(float((out - dense).abs().max()))
        # No more than all keys but one, each with at most 2**-limit of the largest weight, in both sums.
        assert errors[-1] <= 2 * layout.tokens * 2**-limit * v.abs().max()
    assert errors[0] > errors[1] > errors[2]
    without = cases.attend(get_method("sparge", **parameters), layout, q, k, v)
    large = cases.attend(get_method("sparge", pv_threshold=50, **parameters), layout, q, k, v)
    torch.testing.assert_close(large, without, atol=1e-12, rtol=0)


def test_the_filter_comes_on_top_of_quantisation():
    parameters = {"precision": "int8", "pv_threshold": 3.0, "smooth": False}
    assert get_method("sparge", **parameters).precision == Precision("int8", False, 3 * math.log(2))
    assert get_method("sparge").precision is None
    layout = TokenLayout((3, 5, 7))
    q, k, v = sharp(layout)
    method = get_method("sparge", block=16, key_block=8, order="raster", **parameters)
    plan = method.plan(layout, q, k, v)[1]
    got = method.compute(q, k, v, plan, cases.CallContext(layout), backend="torch")
    wanted = block_attention(q, k, v, plan, precision=method.precision, backend="reference")
    torch.testing.assert_close(got, wanted, atol=1e-10, rtol=1e-9)
    unfiltered = block_attention(q, k, v, plan, precision=Precision("int8", False), backend="reference")
    assert (got - unfiltered).abs().max() > 1e-4


def test_a_backend_that_cannot_filter_says_so(monkeypatch):
    method = get_method("sparge", pv_threshold=5, block=16, key_block=16)
    layout = TokenLayout((2, 4, 8))
    q, k, v = (x.bfloat16() for x in cases.tensors(layout))
    request = request_of(q, method.plan(layout, q, k, v)[1], None, precision=method.precision)
    on_gpu = replace(request, device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    reasons = backends(on_gpu)
    assert "may be skipped for compute capability 10.x" in reasons["triton"] or "not installed" in reasons["triton"]
    assert "for tests on the CPU" in reasons["torch"]
    assert "neither quantises nor skips" in reasons["flex"]
    module = torch.nn.Identity()
    engine = Engine(method, Schedule.make(), [module], backend="flex")
    engine.begin(RunState(layout.grid, 0, 1.0, "cond"))
    with pytest.raises(UnsupportedError, match="backend 'flex' cannot run this call"):
        engine.attend(module, *(x.transpose(1, 2) for x in (q, k, v)), dense=lambda: None)


@pytest.mark.parametrize("value", [-1, "nan", float("inf")])
def test_a_limit_below_zero_or_without_end_is_refused(value):
    with pytest.raises(ConfigError, match="pv_threshold"):
        get_method("sparge", pv_threshold=value)
