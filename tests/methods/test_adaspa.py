"""AdaSpa against its definition: exact mass, budgets in classes, searches at a few steps."""

from __future__ import annotations

import itertools

import dynamic_cases as cases
import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.schedule import Schedule
from dit_accel.selection.scores import block_mass
from dit_accel.state import CallContext, RunState

LAYOUT = TokenLayout((4, 4, 8), 10, "after")


def plain(**parameters):
    return get_method("adaspa", block=16, **{"heads": "uniform", **parameters})


def test_a_search_with_the_cached_sums_of_unchanged_tensors_repeats_the_plan():
    q, k, _ = cases.tensors(LAYOUT)
    call = CallContext(LAYOUT)
    first = cases.video_mask(plain(), LAYOUT, q, k, call)
    assert torch.equal(cases.video_mask(plain(), LAYOUT, q, k, call), first)
    call.memory["lse"] = call.memory["lse"] + 5
    assert torch.equal(cases.video_mask(plain(), LAYOUT, q, k, call), first)


def test_cached_sums_are_those_of_the_first_search_and_an_option():
    q, k, _ = cases.tensors(LAYOUT)
    for cache in (True, False):
        call = CallContext(LAYOUT)
        method = plain(cache_lse=cache)
        method.plan(LAYOUT, q, k, None, call)
        assert ("lse" in call.memory) == cache  # where it is not used it is not kept
        first = call.memory.get("lse")
        method.plan(LAYOUT, 2 * q, k, None, call)
        assert call.memory.get("lse") is first or torch.equal(call.memory["lse"], first)
    blocks = LAYOUT.blocks(16)
    exact, first = block_mass(2 * q, k, blocks, blocks, LAYOUT)
    assert exact[0, 0].sum() == pytest.approx(LAYOUT.tokens, rel=1e-4)
    # Sums that are far off must not overflow.
    call.memory["lse"] = first - 500
    assert cases.video_mask(plain(), LAYOUT, 50 * q, k, call).any(-1).all()


@pytest.mark.parametrize("change", ["heads", "tokens"])
def test_cached_sums_of_another_shape_are_forgotten(change):
    q, k, _ = cases.tensors(LAYOUT)
    call = CallContext(LAYOUT)
    plain().plan(LAYOUT, q, k, None, call)
    layout = LAYOUT if change == "heads" else TokenLayout((2, 5, 7))
    q, k, _ = cases.tensors(layout, heads=3 if change == "heads" else 2)
    later = CallContext(layout, memory=call.memory)
    assert torch.equal(cases.video_mask(plain(), layout, q, k, later), cases.video_mask(plain(), layout, q, k))
    assert later.memory["lse"].shape == q.shape[:3]


def test_every_video_row_keeps_the_budget_and_text_on_top():
    q, k, _ = cases.tensors(LAYOUT)
    mask = cases.video_mask(plain(density=0.3), LAYOUT, q, k)
    text = LAYOUT.text_blocks(LAYOUT.blocks(16))
    assert mask[..., text].all()
    assert mask[:, :, text].all()
    # A share of the nine blocks, text among them, rounded up.
    assert (mask[:, :, ~text][..., ~text].sum(-1) == 3).all()


def test_no_other_mask_of_the_same_width_covers_more():
    layout = TokenLayout((1, 5, 8))
    q, k, _ = cases.tensors(layout, batch=1, heads=1)
    blocks = layout.blocks(8)
    mass, _ = block_mass(q, k, blocks, blocks, layout)
    plan = get_method("adaspa", block=8, heads="uniform", density=0.4).plan(layout, q, k)[1]
    for row in range(5):
        best = max(float(mass[0, 0, row, list(pair)].sum()) for pair in itertools.combinations(range(5), 2))
        assert float((mass[0, 0, row] * plan.to_mask()[0, 0, row]).sum()) == pytest.approx(best)
    assert float(plan.recall(q, k)) == pytest.approx(float((mass * plan.to_mask()).sum() / mass.sum()), abs=1e-5)


def test_three_classes_of_heads_and_their_mean():
    layout = TokenLayout((4, 8, 8))
    q, k, _ = cases.tensors(layout, batch=1, heads=4)
    q = q * torch.tensor([60.0, 0.1, 1.0, 0.1]).view(1, 4, 1, 1)
    widths = cases.video_mask(get_method("adaspa", block=8, density=0.25), layout, q, k).sum(-1)
    assert (widths == widths[..., :1]).all()
    assert widths[0, 0, 0] == 4
    assert sorted(widths[0, :, 0].tolist()) == [4, 8, 8, 12]


def test_the_published_schedule_searches_twice_and_reuses_the_plan_between():
    calls = []

    class Searching(type(plain())):
        def select(self, q, k, call):
            calls.append((call.step, call.branch))
            return super().select(q, k, call)

    schedule = Schedule.make(dense_steps=11, search_steps=[10, 30])
    engine = Engine(Searching(block=16), schedule, [module := nn.Identity()], break_even=1.0)
    for step in range(50):
        for branch in ("cond", "uncond"):
            engine.begin(RunState((2, 4, 8), step, 0.5, branch))
            q, k, v = torch.randn(3, 1, 64, 2, 16, generator=torch.Generator().manual_seed(step)).unbind(0)
            engine.attend(module, q, k, v, dense=lambda q=q: torch.zeros_like(q))
    assert calls == [(10, "cond"), (10, "uncond"), (30, "cond"), (30, "uncond")]
    dense = [call.step for call in engine.calls if call.reason is not None]
    assert dense == [step for step in range(11) for _ in range(2)]


def test_a_constant_per_block_row_in_the_cached_sums_changes_no_choice():
    q, k, _ = cases.tensors(LAYOUT)
    call = CallContext(LAYOUT)
    first = cases.video_mask(plain(), LAYOUT, q, k, call)
    owner = LAYOUT.blocks(16).block_of_token()
    call.memory["lse"] = call.memory["lse"] + torch.linspace(-4, 4, int(owner.max()) + 1)[owner]
    assert torch.equal(cases.video_mask(plain(), LAYOUT, q, k, call), first)
