"""When plans are made and who uses them: search steps, groups of layers, representative heads."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.methods.subblock import SubBlock
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.reuse import order_for_all, overlap, plan_for_all, representative_heads, union_of_heads
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

GRID = (2, 4, 8)


class Counting(SubBlock):
    """SubBlock that notes each selection as (layer, step, branch, heads)."""

    made: ClassVar[list] = []

    def select(self, q, k, call):
        self.made.append((call.layer, call.step, call.branch, q.shape[1]))
        call.measures["blocks"] = 8
        return super().select(q, k, call)


class Run:
    """A transformer of `layers` attention layers, driven by hand."""

    def __init__(self, layers=2, heads=4, method=None, **schedule):
        Counting.made.clear()
        self.modules = [nn.Identity() for _ in range(layers)]
        self.method = method or Counting(block=8, density=0.25)
        self.engine = Engine(self.method, Schedule.make(**schedule), self.modules, break_even=1.0)
        self.heads, self.plans = heads, {}

    def step(self, step, branch="cond", generation=0, seed=None, grid=GRID):
        self.engine.begin(RunState(grid, step, 1 - step / 50, branch, generation=generation))
        outs = []
        for layer, module in enumerate(self.modules):
            generator = torch.Generator().manual_seed(step * 100 + layer if seed is None else seed + layer)
            tokens = grid[0] * grid[1] * grid[2]
            q, k, v = torch.randn(3, 1, tokens, self.heads, 16, generator=generator)
            exact = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
            out = self.engine.attend(module, q, k, v, dense=lambda exact=exact: exact.transpose(1, 2))
            outs.append((out, exact.transpose(1, 2)))
        return outs

    @property
    def searched(self):
        return [(layer, step) for layer, step, *_ in Counting.made]


def test_plans_are_made_at_search_steps_alone():
    run = Run(layers=1, search_steps=[3, 6], dense_steps=4)
    for step in range(9):
        ((out, exact),) = run.step(step)
        assert torch.equal(out, exact) == (step < 4)
    assert run.searched == [(0, 3), (0, 6)]
    reasons = [call.reason for call in run.engine.calls]
    assert all(reason.startswith("step") for reason in reasons[:4])
    assert reasons[4:] == [None] * 5
    assert run.engine.calls[3].milliseconds("select") > 0
    assert 0 < run.engine.calls[6].measures["overlap"] < 1
    assert run.engine.calls[6].to_dict()["measures"]["blocks"] == 8
    assert "measures" not in run.engine.calls[5].to_dict()


def test_a_skipped_search_step_searches_at_the_next_executed_one():
    run = Run(layers=1, search_steps=[2, 5])
    for step in (0, 1, 3, 4, 7, 8):
        run.step(step)
    assert run.searched == [(0, 0), (0, 3), (0, 7)]


def test_a_new_generation_shape_or_branch_starts_without_plans():
    run = Run(layers=1, search_steps=1)
    for step in range(3):
        for branch in ("cond", "uncond"):
            run.step(step, branch)
    assert [(s, b) for _, s, b, _ in Counting.made] == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    run.step(0, generation=1)
    run.step(1, generation=1, grid=(2, 4, 4))
    run.step(2, generation=1, grid=(2, 4, 4))
    assert [s for _, s, *_ in Counting.made[4:]] == [0, 1]


def test_dense_layers_never_search_and_short_sequences_do_not():
    run = Run(layers=2, search_steps=0, dense_steps=2, dense_layers=1)
    run.step(0)
    run.step(1)
    assert run.searched == [(1, 0)]
    short = Run(layers=1, search_steps=0, dense_steps=2, min_tokens=1000)
    short.step(0)
    assert short.searched == []


def test_refresh_of_one_equals_no_reuse_and_of_two_halves_the_selections():
    once, twice = Run(layers=1), Run(layers=1, refresh=2)
    for step in range(4):
        once.step(step)
    assert run_steps(once) == [0, 1, 2, 3]
    Counting.made.clear()
    for step in range(4):
        twice.step(step)
    assert run_steps(twice) == [0, 2]


def run_steps(run):
    return [step for _, step in run.searched]


@pytest.mark.parametrize("heads", ["union", "index"])
def test_layers_of_a_group_use_the_plan_of_its_first(heads):
    run = Run(layers=4, layer_groups=[[0, 3]], layer_heads=heads)
    run.step(0, seed=1)
    run.step(1, seed=2)
    assert run.searched == [(0, 0), (3, 0), (0, 1), (3, 1)]
    own, other = run.engine.calls[4], run.engine.calls[5]
    assert other.density == own.density if heads == "index" else other.density > own.density
    run = Run(layers=3, layer_groups=[[0, 3]], layer_heads="index", dense_layers=1)
    run.step(0)
    assert run.searched == [(1, 0)]


def test_representatives_plan_for_their_heads():
    run = Run(layers=1, heads=4, head_groups=2)
    run.step(0)
    assert Counting.made == [(0, 0, "cond", 2)]
    every = Run(layers=1, heads=4, head_groups=4)
    ((out, _),) = every.step(0)
    ((plain, _),) = Run(layers=1, heads=4).step(0)
    assert torch.equal(out, plain)
    with pytest.raises(ConfigError, match="divisor of the 4 heads"):
        Run(layers=1, heads=4, head_groups=3).step(0)


def test_heads_that_are_alike_get_their_own_plan_from_a_representative():
    layout = TokenLayout(GRID)
    q, k = torch.randn(2, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).repeat_interleave(2, 2)
    method = get_method("subblock", block=8)
    plan = method.plan(layout, *(representative_heads(x, 2) for x in (q, k)))[1]
    spread = plan_for_all(plan, (1, 2), (1, 4))
    assert torch.equal(spread.validate().to_mask(), method.plan(layout, q, k)[1].to_mask())
    order = TokenOrder(torch.stack([torch.arange(64), torch.arange(64).flip(0)]).unsqueeze(0))
    many = order_for_all(order, (1, 2), (1, 4))
    assert torch.equal(many.query[0, :, 0], torch.tensor([0, 0, 63, 63]))
    shared = TokenOrder(torch.arange(64))
    assert torch.equal(order_for_all(shared, (1, 2), (1, 4)).query, shared.query)


def test_union_and_overlap():
    blocks = Blocking.uniform(32, 8)
    mask = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4
    mask |= torch.eye(4, dtype=torch.bool)
    plan = BlockPlan.from_mask(mask, blocks, blocks)
    union = union_of_heads(plan).validate()
    assert torch.equal(union.to_mask(), mask.any(1, keepdim=True))
    assert union_of_heads(union) is union
    assert overlap(plan, plan) == 1
    other = BlockPlan.from_mask(torch.eye(4, dtype=torch.bool).expand(2, 3, -1, -1), blocks, blocks)
    assert float(overlap(plan, other)) == pytest.approx(float((4 / mask.sum((-1, -2))).mean()))


def test_the_union_keeps_whole_what_any_head_keeps_whole():
    layout = TokenLayout((4, 6, 6))
    plan = get_method("neighborhood", window=[3, 3, 3]).plan(layout, *torch.randn(2, 1, 1, 144, 8).unbind(0))[1]
    twice = replace(
        plan,
        indices=plan.indices.repeat(1, 2, 1, 1),
        counts=plan.counts.repeat(1, 2, 1),
        full_counts=plan.full_counts.repeat(1, 2, 1),
    )
    union = union_of_heads(twice)
    assert union.indices.shape[1] == 1
    assert torch.equal(union.to_token_mask(), plan.to_token_mask())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"search_steps": [3, 1]}, "ascending"),
        ({"search_steps": [1, 1]}, "each once"),
        ({"search_steps": [1], "refresh": 2}, "give one of them"),
        ({"search_steps": [-1]}, "greater than or equal to 0"),
        ({"layer_groups": [[0, 3], [2, 4]]}, "overlaps"),
        ({"layer_heads": "mean"}, "expected 'union' or 'index'"),
        ({"head_groups": 0}, "greater than or equal to 1"),
    ],
)
def test_faults_of_reuse_are_named(values, message):
    with pytest.raises(ConfigError, match=message):
        Schedule.make(**values)
