"""Padding that reaches into the video: methods that leave it last are exact there, the others do not run."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dit_accel.engine import Engine
from dit_accel.errors import PlanError
from dit_accel.head_table import HeadTable
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.orders.ordering import ContentName, SpaceName
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

GRID = (3, 6, 8)
LAYOUTS = {
    "none": TokenLayout(GRID, valid=(144, 107)),
    "before": TokenLayout(GRID, 9, "before", valid=(153, 116)),
    "after": TokenLayout(GRID, 9, "after", valid=(150, 107)),
}
REASON = "padding reaches into the video, whose tokens method {!r} moves"


def methods():
    """Every method, whole where it takes a density, `composed` in every order."""
    for name in list_methods():
        whole = {"density": 1.0} if "density" in method_class(name).model_fields else {}
        yield name, get_method(name, **whole)
    for order in get_args(SpaceName) + get_args(ContentName):
        yield f"composed {order}", get_method("composed", order=order, density=1.0, axes=["whf"], block=16)
    for mode in ("diagonal", "multi_diagonal"):
        yield f"sparse_vdit {mode}", get_method("sparse_vdit", mode=mode, density=1.0)


METHODS = dict(methods())


def expected(q, k, v, layout):
    real = torch.arange(layout.tokens) < torch.tensor(layout.valid)[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None])


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("name", METHODS)
def test_whole_attention_is_dense_attention_or_is_refused(name, text):
    layout, method = LAYOUTS[text], METHODS[name]
    q, k, v = torch.randn(3, 2, 4, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
    call = CallContext(layout)
    if not method.keeps_padding_last:
        with pytest.raises(PlanError, match=r"expected at least .* moves video tokens"):
            method.plan(layout, q, k, v, call)
        return
    order, plan = method.plan(layout, q, k, v, call)
    ordered = (q, k, v) if order is None else order.apply(q, k, v)
    out = method.compute(*ordered, plan, call)
    out, dense = out if order is None else order.restore(out), expected(q, k, v, layout)
    if getattr(method, "density", None) != 1.0 and name != "dense":
        assert order is None  # a rule of its own: not whole, but in the raster
        return
    for item, length in enumerate(layout.valid):
        torch.testing.assert_close(out[item, :, :length], dense[item, :, :length], atol=2e-5, rtol=1e-4)


def test_those_that_run_are_in_the_raster_or_sort_padding_last():
    keep = {name for name, method in METHODS.items() if method.keeps_padding_last}
    assert {"radial", "aurora", "svg2", "composed raster", "composed kmeans", "sparse_vdit diagonal"} <= keep
    moving = {"asa", "clear", "grat", "llsa", "neighborhood", "sliding_tile", "svg", "vmoba"}
    assert not keep & {*moving, "sparse_vdit multi_diagonal", "composed tile", "composed lsh", "composed hot_keys"}


class Layer(nn.Module):
    heads = 4


def run(method, schedule, valid):
    """One call whose stock attention gives zeros; output and record."""
    layer = Layer()
    engine = Engine(method, schedule, [layer], break_even=1.0)
    engine.begin(RunState(GRID, 0, 1.0, "cond"))
    q, k, v = torch.randn(3, 2, 144, 4, 16)
    out = engine.attend(layer, q, k, v, dense=lambda: torch.zeros_like(q), valid=valid)
    return out, engine.calls[-1]


@pytest.mark.parametrize(("order", "runs"), [("tile", False), ("hilbert", False), ("kmeans", True), ("raster", True)])
def test_the_engine_runs_dense_and_says_why(order, runs):
    method = get_method("composed", order=order, density=0.5, block=16)
    out, call = run(method, Schedule(), (144, 107))
    assert call.reason == (None if runs else REASON.format("composed"))
    assert bool(out.any()) == runs
    assert run(method, Schedule(), (144, 144))[1].reason is None


def test_one_head_that_moves_tokens_makes_the_call_dense():
    modes = {"a": {"method": "radial"}, "b": {"method": "sliding_tile"}, "c": {"method": "skip"}}
    tables = [HeadTable.make({"modes": modes, "heads": [[*names]]}) for names in ("aaca", "abca")]
    reasons = [run(get_method("radial"), Schedule(head_table=table), (144, 107))[1].reason for table in tables]
    assert reasons == [None, REASON.format("sliding_tile")]
