"""Guidance branches of a step: one order and one choice, as calls of their own and as rows of one batch."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch.nn import functional as F

from dit_accel.acceleration import accelerate
from dit_accel.engine import Engine
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.planner import Planner, PlanRequest
from dit_accel.report.records import CallRecord
from dit_accel.samples.captured_attention import synthetic
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

SMOOTH = {call.name: call for call in synthetic()}["smooth"]
GRID = (2, 8, 8)
SMALL = {"block": 16, "query_block": 16, "density": 0.4}


def noisy(qkv, amount, seed=3):
    """What another branch sees: nearly the same."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(x + amount * x.std() * torch.randn(x.shape, generator=generator) for x in qkv)


def tensors(layout, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, 2, layout.tokens, 16, generator=generator) for _ in range(3))


class Run:
    """Calls of one layer through the planner; `plan` gives order and plan of a step and branch."""

    def __init__(self, method, **schedule):
        self.method, self.planner = method, Planner(Schedule(**schedule))

    def plan(self, layout, qkv, step=0, branch="cond"):
        state = RunState(layout.grid, step, 1.0, branch, batch=len(qkv[0]))
        record = CallRecord("transformer", 0, step, branch, 0, "", None)
        planned, ordered = self.planner.plan(PlanRequest(self.method, 0, layout, state), qkv, record)
        return planned.order, planned.plan, ordered

    def out(self, layout, qkv, branch="cond"):
        order, plan, ordered = self.plan(layout, qkv, 0, branch)
        state = RunState(layout.grid, 0, 1.0, branch, batch=len(qkv[0]))
        context = self.planner.call(PlanRequest(self.method, 0, layout, state), len(qkv[0]))
        return order.restore(self.method.compute(*ordered, plan, context, backend="torch"))


def same(plan, other):
    return plan.to_mask().shape == other.to_mask().shape and torch.equal(plan.to_mask(), other.to_mask())


@pytest.mark.parametrize("as_rows", [False, True])
def test_guidance_does_not_multiply_what_branches_err_alike(as_rows):
    cond, uncond, layout, guided = SMOOTH.qkv, noisy(SMOOTH.qkv, 0.1), SMOOTH.layout, {}
    for across in (True, False):
        run = Run(get_method("aurora", across_branches=across))
        if as_rows:
            both = tuple(torch.cat(pair) for pair in zip(uncond, cond, strict=True))
            errors = (run.out(layout, both, "cond_uncond") - F.scaled_dot_product_attention(*both)).flip(0)
        else:
            outs = [run.out(layout, qkv, name) for name, qkv in (("cond", cond), ("uncond", uncond))]
            exact = [F.scaled_dot_product_attention(*qkv) for qkv in (cond, uncond)]
            errors = torch.cat(outs) - torch.cat(exact)
        guided[across] = (4 * errors[0] - 3 * errors[1]).norm()
    assert guided[True] < 0.8 * guided[False]


def test_rows_of_a_batch_get_what_separate_calls_get():
    """Two prompts, [uncond, uncond, cond, cond]: the conditional row of each decides for both of its rows."""
    layout, method = TokenLayout(GRID, 9, "after"), get_method("aurora", **SMALL)
    rows = tensors(layout, batch=4)
    order, plan, _ = Run(method).plan(layout, rows, branch="cond_uncond")
    alone, chosen, _ = Run(method).plan(layout, tuple(x[2:] for x in rows))
    for made, own in ((order.query, alone.query), (order.key_index, alone.key_index)):
        assert torch.equal(made, own.repeat(2, 1, 1))
    assert torch.equal(plan.validate().to_mask(), chosen.to_mask().repeat(2, 1, 1, 1))


def test_the_rows_of_one_prompt_share_one_plan():
    layout, method = TokenLayout(GRID), get_method("aurora", **SMALL)
    rows = tensors(layout, batch=2)
    order, plan, ordered = Run(method).plan(layout, rows, branch="cond_uncond")
    assert plan.indices.shape[0] == order.query.shape[0] == 1
    assert torch.equal(ordered[1], order.apply(*rows)[1])


@pytest.mark.parametrize("case", ["not announced", "one branch of two", "other padding", "not asked for", "order"])
def test_rows_decide_for_themselves_where_none_can_for_all(case):
    layout, parameters = TokenLayout(GRID, 9, "after"), dict(SMALL)
    rows, branch = tensors(layout, batch=2), "cond" if case == "not announced" else "cond_uncond"
    if case == "other padding":
        layout = replace(layout, valid=(137, 130))
    if case == "not asked for":
        parameters["across_branches"] = False
    method = get_method("pbs") if case == "order" else get_method("aurora", **parameters)
    run = Run(method)
    if case == "one branch of two":  # as a step cache does, behind the back of the pipeline
        state = RunState(GRID, 0, 1.0, branch, batch=4)
        record = CallRecord("transformer", 0, 0, branch, 0, "", None)
        plan = run.planner.plan(PlanRequest(method, 0, layout, state), rows, record)[0].plan
    else:
        plan = run.plan(layout, rows, branch=branch)[1]
    assert plan.indices.shape[0] == 2


def test_a_choice_is_that_of_another_branch_of_the_same_step_and_geometry():
    layout, run = TokenLayout(GRID, 9, "after", valid=(133,)), Run(get_method("aurora", **SMALL))

    def made(step, branch, of=layout, seed=0):
        return run.plan(of, tensors(of, seed=seed), step, branch)[:2]

    order, plan = made(0, "cond")
    assert not same(made(0, "cond", seed=1)[1], plan)
    later = made(1, "cond", seed=2)[1]
    assert same(made(1, "uncond", seed=3)[1], later)
    shorter, own = made(1, "uncond", TokenLayout(GRID, 9, "after", valid=(130,)), seed=3)
    assert torch.equal(shorter.query, order.query)
    assert not same(own, later)


def test_a_choice_holds_for_as_long_as_the_schedule_says():
    layout, run = TokenLayout(GRID), Run(get_method("aurora", **SMALL), refresh=2)
    first = run.plan(layout, tensors(layout, seed=0), 0, "cond")[1]
    for number, (step, branch) in enumerate([(0, "uncond"), (1, "cond"), (1, "uncond")], 1):
        assert same(run.plan(layout, tensors(layout, seed=number), step, branch)[1], first)
    assert not same(run.plan(layout, tensors(layout, seed=5), 2, "cond")[1], first)


def test_what_branches_share_is_kept_per_layer_and_forgotten_with_the_rest():
    planner, method, layout = Planner(Schedule()), get_method("aurora"), TokenLayout(GRID)

    def kept(layer, branch):
        return planner.call(PlanRequest(method, layer, layout, RunState(layout.grid, 0, 1.0, branch)), 1)

    kept(0, "cond").branches["order"] = "made"
    assert kept(0, "uncond").branches == {"order": "made"}
    assert (
        kept(0, "uncond").memory == kept(0, "cond").memory == kept(0, "cond").shared == kept(1, "cond").branches == {}
    )
    planner.reset()
    assert kept(0, "uncond").branches == {}


def test_history_is_kept_apart_where_branches_share_blocks():
    """The rest of a branch is its own, and goes with the blocks that were chosen at its refresh."""
    layout, layer = TokenLayout(GRID), torch.nn.Identity()
    outs = {}
    for share in (False, True):
        method = get_method("composed", order="raster", block=16, remainder="history", across_branches=share, ramp=0.0)
        engine = Engine(method, Schedule(), [layer], break_even=1.0)
        for step in range(2):
            for seed, branch in enumerate(("cond", "uncond")):
                engine.begin(RunState(GRID, step, 1.0, branch))
                qkv = [x.transpose(1, 2) for x in tensors(layout, seed=seed)]
                outs[share, step, branch] = engine.attend(layer, *qkv, dense=lambda: torch.empty(0))
    for branch in ("cond", "uncond"):
        # The same tensors as at the refresh: selected part and rest together are dense again.
        torch.testing.assert_close(outs[True, 1, branch], outs[True, 0, branch], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(outs[True, 0, branch], outs[False, 0, branch])


class Watched(type(get_method("aurora"))):
    """Aurora, as users get it, that remembers which batches it was asked to choose for."""

    asked: ClassVar[list[int]] = []

    def select(self, q, k, call):
        self.asked.append(len(q))
        return super().select(q, k, call)


@pytest.mark.parametrize(
    ("name", "guidance", "branches"),
    [
        ("cogvideox-2b", {"guidance_scale": 5.0}, {"cond_uncond"}),
        ("wan2.1-t2v", {"guidance_scale": 5.0}, {"cond", "uncond"}),
        ("flux1-dev", {"true_cfg_scale": 4.0, "negative_prompt": "blurred"}, {"cond", "uncond"}),
    ],
)
def test_a_pipeline_chooses_once_per_layer_and_step(name, guidance, branches):
    """CogVideoX runs both branches in one batch, the others one after the other."""
    Watched.asked.clear()
    pipe, steps = tiny_pipeline(name), 2
    method = Watched(**SMALL, renew=1)
    with accelerate(pipe, method=method, break_even=1.0) as acceleration:
        out = torch.as_tensor(pipe(**(tiny_arguments(name, steps=steps) | guidance))[0])
        calls = acceleration.report().calls
        layers = {call.layer for call in calls}
    assert out.isfinite().all()
    assert Watched.asked == [1] * steps * len(layers)
    assert {call.branch for call in calls} == branches
