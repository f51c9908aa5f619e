"""Solving for a preset: budgets of error, density and time, groups of heads, palettes, probes, finalists."""

from __future__ import annotations

import itertools

import pytest
import torch
from calibration_cases import METHODS, small_plan

from dit_accel.calibrate.assign import Palette, assign, palettes
from dit_accel.calibrate.finalists import best_of, finalists
from dit_accel.calibrate.solve import solve
from dit_accel.calibrate.statistics import Statistics
from dit_accel.errors import ConfigError
from dit_accel.methods.registry import get_method


def brute_force(error, cost, max_error=None, max_cost=None):
    layers, heads, count = error.shape
    best = None
    for choice in itertools.product(range(count), repeat=layers * heads):
        index = torch.tensor(choice).view(layers, heads, 1)
        total_error = float((error.gather(-1, index).sum() / layers).sqrt())
        total_cost = float(cost.gather(-1, index).mean())
        within = total_error <= max_error if max_error is not None else total_cost <= max_cost
        value = total_cost if max_error is not None else total_error
        if within and (best is None or value < best):
            best = value
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_assignment_keeps_the_budget_and_is_near_the_best(seed):
    generator = torch.Generator().manual_seed(seed)
    cost = torch.rand(2, 3, 3, generator=generator).sort(-1).values
    error = (1 - cost) ** 2 * torch.rand(2, 3, 1, generator=generator) + 0.05 * torch.rand(2, 3, 3, generator=generator)
    largest_step = float((cost.amax(-1) - cost.amin(-1)).max()) / 6
    middle = float((error.amin(-1).sum() / 2).sqrt() + (error.amax(-1).sum() / 2).sqrt()) / 2
    found = solve(error, cost, max_error=middle)
    assert found.error <= middle
    assert found.cost <= brute_force(error, cost, max_error=middle) + largest_step
    budget = float(cost.amin(-1).mean() + cost.amax(-1).mean()) / 2
    found = solve(error, cost, max_cost=budget)
    assert found.cost <= budget * (1 + 1e-6)
    largest_gain = float((error.amax(-1) - error.amin(-1)).max())
    assert found.error**2 * 2 <= brute_force(error, cost, max_cost=budget) ** 2 * 2 + largest_gain


def test_budgets_at_steps_of_the_hull_are_solved_exactly():
    error = torch.tensor([[[9.0, 3.0, 1.0], [8.0, 7.5, 0.0]]])
    cost = torch.tensor([[[0.1, 0.2, 0.4], [0.1, 0.3, 0.4]]])
    assert solve(error, cost, max_cost=0.15).choice.tolist() == [[1, 0]]
    assert solve(error, cost, max_cost=0.3).choice.tolist() == [[1, 2]]
    assert solve(error, cost, max_error=3.0**0.5).choice.tolist() == [[1, 2]]
    assert solve(error, cost, max_error=5.0).choice.tolist() == [[0, 0]]


def test_an_impossible_budget_says_what_is_possible():
    error, cost = torch.tensor([[[0.04, 0.01]]]), torch.tensor([[[0.2, 0.5]]])
    with pytest.raises(ConfigError, match=r"at least 0\.1, .* got 0\.05"):
        solve(error, cost, max_error=0.05)
    with pytest.raises(ConfigError, match=r"at least 0\.2, .* got 0\.1"):
        solve(error, cost, max_cost=0.1)
    for budgets in ({}, {"max_error": 0.1, "max_cost": 0.1}):
        with pytest.raises(ConfigError, match="either"):
            solve(error, cost, **budgets)


def held(error, density=None, layers=2, heads=2, **sums):
    """Statistics of one range of steps, one call per layer, from errors per candidate."""
    kinds, probed, alone = sums.pop("kinds", None), sums.pop("probed", []), sums.pop("alone", [])
    ranges = len(sums.get("calls", [0]))
    made = Statistics.empty(layers, heads, len(error), ranges, sums.pop("parts", 0), sums.pop("prompts", 1), kinds)
    made.error[:] = torch.tensor(error)
    made.density[:] = torch.tensor(density or [0.4] * len(error))
    made.calls[:] = 1
    made.alone_change[:] = made.error.sum(2).mean((0, 1))
    for name, values in sums.items():
        getattr(made, name)[:] = torch.tensor(values, dtype=torch.float64)
    made.probed, made.alone = probed, alone
    return made


def test_layers_that_were_never_seen_do_not_count():
    found = held([0.04, 0.0], [0.2, 1.0], heads=1, calls=[[0.0, 4.0]])
    found.error *= 4
    found.density *= 4
    cheap = assign(found, max_error=0.25)
    assert (cheap.error, cheap.cost) == (pytest.approx(0.2), pytest.approx(0.2))
    assert cheap.choice.tolist() == [[[0], [0]]]
    # The layer that always runs dense takes what the others take: it must not ask for an order of its own.
    assert assign(found, max_error=0.1).choice.tolist() == [[[1], [1]]]
    with pytest.raises(ConfigError, match="nothing was measured"):
        assign(Statistics.empty(2, 1, 2), max_error=0.1)
    with pytest.raises(ConfigError, match="got several"):
        assign(found, max_error=0.1, max_time=0.1)


def timed(*rest, order=0.0, group=0.0):
    """Times of one prompt: of attention without ordering, of ordering, and with dense heads in the same layer."""
    mixed = [(each + order + 1) / 2 + group for each in rest]
    return {"time": [[list(rest), [order] * len(rest), mixed]], "alone": [0]}


def test_a_budget_of_time_takes_the_faithful_among_the_fast():
    """Two candidates of equal density: the one that is closer takes three times as long."""
    found = held([0.04, 0.01, 0.0], **timed(0.2, 0.6, 1.0))
    assert assign(found, max_time=0.3).time == pytest.approx(0.3)
    assert sorted(assign(found, max_time=0.3).choice.flatten().tolist()) == [0, 0, 0, 1]
    assert assign(found, max_time=1.0).choice.unique().tolist() == [2]
    with pytest.raises(ConfigError, match=r"--max-time: expected at least 0\.2"):
        assign(found, max_time=0.1)
    with pytest.raises(ConfigError, match="no times"):
        assign(held([0.04, 0.0]), max_time=0.5)


def test_kinds_that_share_a_layer_cost_more_than_each_in_the_whole_layer():
    found = held([0.04, 0.0], **timed(0.2, 0.6, group=0.05), layers=1)
    heads, group = found.mean_time()
    assert group.flatten().tolist() == pytest.approx([0.05, 0.05])
    assert heads[0, 0, 0].tolist() == pytest.approx([0.2, 0.6])
    assert assign(found, max_time=0.6).time == pytest.approx(0.6)
    # Both in one layer: (0.2 + 0.6) / 2 and 0.05 for each.
    assert sorted(assign(found, max_time=0.5).choice.flatten().tolist()) == [0, 1]
    assert assign(found, max_time=0.5).time == pytest.approx(0.5)
    assert assign(found, max_time=0.49).choice.unique().tolist() == [0]


def test_heads_of_one_kind_run_in_one_call_and_cost_nothing_more():
    found = held([0.04, 0.0], **timed(0.2, 0.6, group=0.05), layers=1, kinds=(0, 0))
    assert sorted(assign(found, max_time=0.4).choice.flatten().tolist()) == [0, 1]
    assert assign(found, max_time=0.4).time == pytest.approx(0.4)


def test_what_a_kind_costs_was_measured_with_its_first_candidate():
    found = held([0.04, 0.01, 0.0], **timed(0.2, 0.4, 0.6, group=0.05), layers=1, kinds=(0, 0, 2))
    found.time[0, 2, 1] = 0.0
    assert found.mean_time()[1].flatten().tolist() == pytest.approx([0.05] * 3)


def test_an_order_that_all_share_costs_the_layers_nothing():
    found = held([0.04, 0.01, 0.0], **timed(0.1, 0.2, 0.5, order=0.1), layers=1)
    assert assign(found, max_time=0.4).choice.unique().tolist() == [1]
    shared = [Palette((0, 2), hoisted=True), Palette((0, 1, 2), hoisted=False)]
    best = assign(found, max_time=0.5, among=shared)
    assert best.choice.unique().tolist() == [2]
    assert best.time == pytest.approx(0.5)


def test_a_run_that_was_timed_well_attracts_nothing():
    found = held([0.04, 0.0], layers=1, prompts=3, alone=[0, 1, 2])
    for number, (rest, group, order) in enumerate(((0.0, 0.0, 0.1), (0.2, 0.1, 0.2), (0.3, 0.2, 0.9))):
        found.time[number] = torch.tensor(timed(rest, 0.6, order=order, group=group)["time"][0], dtype=torch.float64)
    heads, group = found.mean_time()
    torch.testing.assert_close(heads[0, :, 0], torch.tensor([[0.4, 0.8]], dtype=torch.float64))
    assert group[0, 0, 0] == pytest.approx(0.2)  # the largest


def test_palettes_are_the_candidates_of_one_order_and_all():
    methods = {"a": METHODS["tiles"], "b": METHODS["bands"], "dense": METHODS["dense"]}
    methods["c"] = get_method("composed", tile=(2, 3, 3), density=0.6)
    plan = small_plan(candidates=methods)
    assert palettes(plan) == (Palette((0, 2, 3), hoisted=True), Palette((0, 1, 2, 3), hoisted=False))
    assert palettes(plan, hoists=False) == (Palette((0, 1, 2, 3), hoisted=False),)


def test_heads_share_the_time_of_their_layer_by_density():
    found = held([0.0], **timed(0.5), layers=1)
    found.density[0, 0, :, 0] = torch.tensor([0.1, 0.3])
    assert found.mean_time()[0].flatten().tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("seed", range(4))
def test_no_uniform_assignment_within_the_budget_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    error, cost = torch.rand(2, 6, 3, 4, generator=generator)
    group, weight = 0.2 * torch.rand(6, 2, generator=generator), torch.rand(6, generator=generator)
    group, kinds = group.repeat_interleave(2, 1), (0, 0, 2, 2)
    share = weight.flip(0) / weight.sum()
    alone = cost.mean(1).mul(share[:, None]).sum(0)
    worth = (error.sum(1) * weight[:, None]).sum(0)
    for limit in alone.tolist():
        found = solve(error, cost, max_cost=limit + 1e-9, fixed=group, kinds=kinds, share=share, weight=weight)
        value = (error.gather(-1, found.choice.unsqueeze(-1)).sum((1, 2)) * weight).sum()
        assert value <= worth[alone <= limit + 1e-9].min() + 1e-6
        used = torch.stack([(found.choice < 2).any(1), (found.choice >= 2).any(1)], 1)
        paid = cost.gather(-1, found.choice.unsqueeze(-1)).mean((1, 2))
        paid += (group[:, ::2].sum(1) * used.all(1)).float()
        assert found.cost == pytest.approx(float(paid @ share), abs=1e-6)


def test_probes_let_errors_count_for_what_they_do_to_the_picture():
    """Both layers err alike; one of them changes the picture nine times as much."""
    found = held([0.04, 0.0], [0.2, 1.0], heads=1, parts=2, change=[[[0.09, 0.01]]])
    found.probed = [(0, 0, 0), (0, 0, 1)]
    assert found.probe == 0
    torch.testing.assert_close(found.weight(), torch.tensor([[0.09, 0.01]], dtype=torch.float64) / 0.04)
    best = assign(found, max_density=0.6)
    assert best.choice.tolist() == [[[1], [0]]]
    assert best.change == pytest.approx(0.01)
    found.change[:] = found.change.flip(2)
    assert assign(found, max_density=0.6).choice.tolist() == [[[0], [1]]]
    assert assign(found, max_density=0.6, weighted=False).change is None


def test_prompts_count_alike_in_probes_however_much_their_pictures_change():
    probed = [(number, 0, part) for number in range(2) for part in range(2)]
    found = held([0.04, 0.0], heads=1, parts=2, prompts=2, change=[[[0.09, 0.01]], [[0.02, 0.18]]], probed=probed)
    # Shares 0.9 and 0.1 of the first, 0.1 and 0.9 of the second; the scale is the geometric mean.
    expected = torch.tensor([[0.5, 0.5]], dtype=torch.float64) * 2 * (0.05 * 0.1) ** 0.5 / 0.04
    torch.testing.assert_close(found.weight(), expected)


def test_kinds_count_for_what_they_do_alone():
    """The first candidate errs less call by call, but changes the picture more when it runs."""
    sums = {"alone": [0], "kinds": (0, 1, 1), "heads": 1, "layers": 1}
    found = held([0.011, 0.02, 0.001], [0.4, 0.4, 0.8], alone_change=[[0.33, 0.02, 0.001]], **sums)
    share = torch.ones(1, 1, dtype=torch.float64)
    assert found.effect(share).tolist() == pytest.approx([30.0, 1.0, 1.0])
    best = assign(found, max_density=0.4)
    assert best.choice.unique().tolist() == [1]
    assert (best.change, best.error) == (pytest.approx(0.02), pytest.approx(0.02**0.5))
    assert assign(found, max_density=0.4, weighted=False).choice.unique().tolist() == [0]
    assert assign(found, max_error=0.12).choice.unique().tolist() == [0]  # a budget of error is one of single calls
    found.alone_change[0, 0] = 0.0011  # no kind counts for less than the one that errs least
    assert found.effect(share).tolist() == pytest.approx([1.0, 1.0, 1.0])
    found.alone_change[0] = torch.tensor([0.33, 0.0, 0.001])  # above the break-even it ran dense: that says nothing
    assert found.effect(share).tolist() == pytest.approx([30.0, 1.0, 1.0])
    found.alone = []
    assert found.effect(share) is None


def test_finalists_differ_and_the_closest_is_taken():
    found = held([0.04, 0.01, 0.0], [0.2, 0.5, 1.0], heads=1, parts=2, change=[[[0.09, 0.01]]])
    found.probed = [(0, 0, 0), (0, 0, 1)]
    found.error[0, 1] *= 5
    plan = small_plan()
    tried = finalists(found, plan, {"max_density": 0.6})
    assert tried["by effect"].choice.flatten().tolist() == [2, 0]
    assert tried["by error"].choice.flatten().tolist() == [0, 2]
    assert tried["uniform"].choice.flatten().tolist() == [1, 1]
    assert best_of(tried, {"by effect": 30.0, "by error": 28.0, "uniform": 31.0}) is tried["uniform"]
    assert [*finalists(found, plan, {"max_density": 1.0})] == ["by error"]
    assert [*finalists(found, plan, {"max_error": 0.1})] == ["by error"]
