"""The table of selection costs: how choices are spread over the steps of a schedule, and when the bar counts as met."""

from __future__ import annotations

import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.samples.bench_selection import SCHEDULES, Cost, measure, page, plans_made
from dit_accel.samples.captured_attention import Call
from dit_accel.schedule import Schedule


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"dense_steps": 10}, (40, 40)),
        ({"dense_steps": 10, "refresh": 2}, (20, 40)),
        ({"dense_steps": 11, "search_steps": [10, 30]}, (2, 39)),  # the first search runs beside a dense step
        ({"dense_steps": 12, "search_steps": [11]}, (1, 38)),
    ],
    ids=["every step", "refresh", "two searches", "one search"],
)
def test_plans_are_counted_as_the_planner_makes_them(rule, expected):
    assert plans_made(Schedule.make(**rule)) == expected


def test_a_row_spreads_choices_over_the_schedule_and_judges_by_that():
    assert SCHEDULES["sparsed"]["search_steps"] == [11]
    method = get_method("sparsed", density=0.25)
    cost = Cost(method, first=[380.0], later=[380.0], moving=[1.0], attending=[50.0], densities=[0.25])
    cells = cost.row("sparsed", 250.0)
    assert cells[5] == "200.0"
    assert cells[6] == f"{381 / 200:.3f}"
    assert cells[8:] == [f"{11 / 200:.3f}", "met"]
    assert cost.row("sparsed", 100.0)[-1] == "**missed**"
    assert cost.row("sparsed", 40.0)[-2] == "saves nothing"


def test_the_page_holds_every_method_with_figures_of_the_calls():
    layout = TokenLayout((2, 8, 8))
    q, k, v = torch.randn(3, 1, 4, 128, 64, generator=torch.Generator().manual_seed(0))
    calls = [Call("layer 0", 0, 3, layout, (q, k, v))]
    dense, costs = measure(calls, 0.5, 2)
    text = page(calls, 0.5, dense, costs)
    assert all(len(cost.first) == 1 == len(cost.later) for _, cost in costs)
    assert all(f"| {label} |" in text for label, _ in costs)
    assert "2x8x8 = 128 tokens" in text
