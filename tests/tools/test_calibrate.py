"""Calibration: what it measures, how it solves, that it resumes, and that the preset it writes runs."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch

import dit_accel
from dit_accel.calibrate import run as calibration
from dit_accel.calibrate.assign import Palette, assign, palettes
from dit_accel.calibrate.clock import layer_times
from dit_accel.calibrate.finalists import best_of, finalists
from dit_accel.calibrate.observer import Observer, take_query_blocks
from dit_accel.calibrate.probe import only
from dit_accel.calibrate.run import Plan, measure
from dit_accel.calibrate.solve import solve
from dit_accel.calibrate.statistics import Statistics, layer_parts
from dit_accel.calibrate.write import head_table, write_preset
from dit_accel.cli import main
from dit_accel.engine import DenseCall
from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.presets import Generation, load_preset
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

LAYOUT = TokenLayout((3, 7, 9), 5, "after", (194, 190))
METHODS = {
    "tiles": get_method("composed", tile=(2, 3, 3), density=0.3),
    "windows": get_method("neighborhood", density=0.3),
    "bands": get_method("radial", block=16),
    "dense": get_method("dense"),
}


def tensors(heads=3, dim=8, layout=LAYOUT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, layout.tokens, dim, generator=generator) for _ in range(3))


def dense_call(layer=0, step=0, seed=0):
    q, k, v = tensors(seed=seed)
    real = torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    return DenseCall("transformer", layer, RunState(LAYOUT.grid, step, 0.5), LAYOUT, q, k, v, out)


@pytest.mark.parametrize("name", ["tiles", "windows", "bands"])
def test_some_query_blocks_give_the_rows_of_all(name):
    method, (q, k, v) = METHODS[name], tensors()
    order, plan = method.plan(LAYOUT, q, k)
    q, k, v = (q, k, v) if order is None else order.apply(q, k, v)
    kv_len = torch.tensor(LAYOUT.valid)
    whole = block_attention(q, k, v, plan, remainder=method.remainder, kv_len=kv_len)
    blocks = torch.tensor([0, 2, plan.q_blocks.count - 1])
    part, tokens = take_query_blocks(plan, blocks)
    rows = block_attention(q[:, :, tokens], k, v, part.validate(), remainder=method.remainder, kv_len=kv_len)
    torch.testing.assert_close(rows, whole[:, :, tokens])
    assert len(tokens) == int(plan.q_blocks.lengths[blocks].sum())


def true_errors(seen):
    """Squared error per head of each method, relative to the squared output of all heads, over the valid rows."""
    real = torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1)
    errors = []
    for method in METHODS.values():
        order, plan = method.plan(LAYOUT, seen.q, seen.k)
        qkv = (seen.q, seen.k, seen.v) if order is None else order.apply(seen.q, seen.k, seen.v)
        out = block_attention(*qkv, plan, remainder=method.remainder, kv_len=torch.tensor(LAYOUT.valid))
        out = out if order is None else order.restore(out)
        wrong = ((out - seen.out).square().sum(-1) * real[:, None]).sum((0, 2))
        errors.append(wrong / (seen.out.square().sum(-1) * real[:, None]).sum())
    return torch.stack(errors, -1)


def test_the_sums_are_the_true_errors_and_densities():
    statistics = Statistics.empty(2, 3, len(METHODS))
    observer = Observer(list(METHODS.values()), Schedule(), statistics)
    first, second = dense_call(1, seed=0), dense_call(1, step=1, seed=1)
    observer(first)
    observer(second)
    expected = (true_errors(first) + true_errors(second)) / 2
    torch.testing.assert_close(statistics.mean_error()[0, 1].float(), expected, rtol=1e-4, atol=1e-9)
    assert statistics.calls.tolist() == [[0, 2]]
    assert statistics.mean_density()[0, 1, :, 3].tolist() == [1.0] * 3
    assert statistics.mean_error()[0, 1, :, 3].max() < 1e-9


def test_a_method_that_works_on_after_the_kernel_gets_all_rows():
    seen, method = dense_call(), get_method("composed", density=0.3, tile=(2, 3, 3), remainder="drop")

    class Halved(type(method)):
        @property
        def completes(self):
            return True

        def complete(self, out, lse, q, k, v, plan, call, scale=None):
            assert out.shape[2] == seen.q.shape[2]
            call.extra_density += 0.125
            return out / 2

    halved = Halved(**method.model_dump(exclude_unset=True))
    statistics = Statistics.empty(1, 3, 1)
    Observer([halved], Schedule(), statistics, share=0.2)(seen)
    order, plan = method.plan(LAYOUT, seen.q, seen.k)
    out = order.restore(halved.compute(*order.apply(seen.q, seen.k, seen.v), plan, CallContext(LAYOUT)))
    real = (torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1))[:, None]
    expected = ((out - seen.out).square().sum(-1) * real).sum((0, 2)) / (seen.out.square().sum(-1) * real).sum()
    torch.testing.assert_close(statistics.mean_error()[0, 0, :, 0].float(), expected, rtol=1e-4, atol=1e-9)
    assert float(statistics.mean_density().mean()) == pytest.approx(plan.density + 0.125, abs=1e-6)


def test_a_share_of_the_blocks_gives_the_error_on_average():
    seen = dense_call()
    statistics = Statistics.empty(1, 3, len(METHODS))
    observer = Observer(list(METHODS.values()), Schedule(), statistics, share=0.3, seed=1)
    for _ in range(60):
        observer(seen)
    torch.testing.assert_close(statistics.mean_error()[0, 0].float(), true_errors(seen), rtol=0.15, atol=1e-6)


def test_calls_that_stay_dense_and_steps_between_are_left_out():
    statistics = Statistics.empty(3, 3, 1)
    schedule = Schedule.make(dense_steps=1, dense_layers=1)
    observer = Observer([METHODS["bands"]], schedule, statistics, every=2)
    for layer, step in itertools.product(range(3), range(5)):
        observer(dense_call(layer, step))
    assert statistics.calls.tolist() == [[0, 2, 2]]


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


SIZES = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "guidance_scale": 1.0, "fps": 5}


def small_plan(**changes):
    # Not as it ships: what is written must keep that.
    preset = load_preset("tiny-wan/composed").model_copy(update={"schedule": Schedule.make(dense_steps=[[1, 2]])})
    candidates = changes.pop("candidates", {name: METHODS[name] for name in ("tiles", "bands", "dense")})
    generation = changes.pop("generation", Generation(**SIZES))
    return Plan(preset, candidates, ("a red ball", "a blue box"), generation, **changes)


def test_a_killed_calibration_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    plan, pipe = small_plan(share=0.5), random_wan_pipeline()
    whole = measure(pipe, plan, tmp_path / "whole.safetensors", lambda line: None)
    told = []
    real = calibration.call_pipeline

    def killed(pipe, generation, prompt, seed, inputs):
        if prompt == plan.prompts[1]:
            raise KeyboardInterrupt
        return real(pipe, generation, prompt, seed, inputs)

    monkeypatch.setattr(calibration, "call_pipeline", killed)
    path = tmp_path / "killed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, plan, path, told.append)
    assert Statistics.load(path, plan.settings() | {"prompts": list(plan.prompts)}).done == [0]
    monkeypatch.setattr(calibration, "call_pipeline", real)
    told.clear()
    resumed = measure(pipe, plan, path, told.append)
    assert "prompt 2 of 2" in told[0]
    assert "left" in told[0]
    assert resumed.done == whole.done == [0, 1]
    assert torch.equal(resumed.error, whole.error)
    assert torch.equal(resumed.density, whole.density)
    told.clear()
    measure(None, plan, path, told.append)  # all is there: the pipeline is not even looked at
    assert len(told) == 1


def test_statistics_of_another_calibration_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    Statistics.empty(1, 1, 1).save(path, small_plan().settings())
    with pytest.raises(ConfigError, match="differs in share"):
        measure(None, small_plan(share=0.5), path, lambda line: None)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        measure(None, small_plan(), path, lambda line: None)


def held(error, density=None, layers=2, heads=2, **sums):
    """Statistics of one range of steps, one call per layer, from errors per candidate."""
    made = Statistics.empty(layers, heads, len(error), len(sums.get("calls", [0])), sums.pop("parts", 0))
    made.error[:] = torch.tensor(error)
    made.density[:] = torch.tensor(density or [0.4] * len(error))
    made.calls[:] = 1
    for name, values in sums.items():
        getattr(made, name)[:] = torch.tensor(values, dtype=torch.float64)
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


def times(*whole, order=0.0, group=0.0):
    """Times of one layer: each group of heads costs `group`, the rest is in proportion to the heads."""
    half = [(each + group) / 2 for each in whole]
    return [list(whole), [order] * len(whole), half, [order / 2] * len(whole)]


def test_a_budget_of_time_takes_the_faithful_among_the_fast():
    """Two candidates of equal density: the one that is closer takes three times as long."""
    found = held([0.04, 0.01, 0.0], time=times(0.2, 0.6, 1.0), timings=1.0)
    assert assign(found, max_time=0.3).time == pytest.approx(0.3)
    assert sorted(assign(found, max_time=0.3).choice.flatten().tolist()) == [0, 0, 0, 1]
    assert assign(found, max_time=1.0).choice.unique().tolist() == [2]
    with pytest.raises(ConfigError, match=r"--max-time: expected at least 0\.2"):
        assign(found, max_time=0.1)


def test_a_group_of_heads_costs_what_two_halves_take_more_than_the_whole():
    found = held([0.04, 0.0], time=times(0.2, 0.6, group=0.1), timings=1.0, layers=1)
    heads, group = found.mean_time()
    assert group.flatten().tolist() == pytest.approx([0.1, 0.1])
    assert heads[0, 0, 0].tolist() == pytest.approx([0.1, 0.5])
    assert assign(found, max_time=0.6).time == pytest.approx(0.6)
    # Both methods in one layer: (0.1 + 0.5) / 2 and a group for each.
    assert sorted(assign(found, max_time=0.5).choice.flatten().tolist()) == [0, 1]
    assert assign(found, max_time=0.5).time == pytest.approx(0.5)
    assert assign(found, max_time=0.49).choice.unique().tolist() == [0]


def test_an_order_that_all_share_costs_the_layers_nothing():
    found = held([0.04, 0.01, 0.0], time=times(0.2, 0.3, 0.6, order=0.1), timings=1.0, layers=1)
    assert assign(found, max_time=0.4).choice.unique().tolist() == [1]
    shared = [Palette((0, 2), hoisted=True), Palette((0, 1, 2), hoisted=False)]
    best = assign(found, max_time=0.6, among=shared)
    assert best.choice.unique().tolist() == [2]
    assert best.time == pytest.approx(0.6)


def test_one_layer_that_was_timed_well_attracts_nothing():
    found = held([0.04, 0.0], layers=3, timings=1.0)
    for layer, (group, order) in enumerate(((0.0, 0.0), (0.1, 0.2), (0.2, 0.4))):
        found.time[layer] = torch.tensor(times(0.2, 0.6, group=group, order=order), dtype=torch.float64)
    heads, group = found.mean_time()
    torch.testing.assert_close(group, torch.full((1, 3, 2), 0.1, dtype=torch.float64))
    torch.testing.assert_close(heads[0, :, 0], torch.tensor([[0.3, 0.7]] * 3, dtype=torch.float64))


def test_palettes_are_the_candidates_of_one_order_and_all():
    methods = {"a": METHODS["tiles"], "b": METHODS["bands"], "dense": METHODS["dense"]}
    methods["c"] = get_method("composed", tile=(2, 3, 3), density=0.6)
    plan = small_plan(candidates=methods)
    assert palettes(plan) == (Palette((0, 2, 3), hoisted=True), Palette((0, 1, 2, 3), hoisted=False))
    assert palettes(plan, hoists=False) == (Palette((0, 1, 2, 3), hoisted=False),)


def test_heads_share_the_time_of_their_layer_by_density():
    found = held([0.0], time=times(0.5), timings=1.0, layers=1)
    found.density[0, 0, :, 0] = torch.tensor([0.1, 0.3])
    assert found.mean_time()[0].flatten().tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("seed", range(4))
def test_no_uniform_assignment_within_the_budget_is_better(seed):
    generator = torch.Generator().manual_seed(seed)
    error, cost = torch.rand(2, 6, 3, 4, generator=generator)
    group, weight = 0.2 * torch.rand(6, 4, generator=generator), torch.rand(6, generator=generator)
    share = weight.flip(0) / weight.sum()
    alone = (cost.mean(1) + group).mul(share[:, None]).sum(0)
    worth = (error.sum(1) * weight[:, None]).sum(0)
    for limit in alone.tolist():
        found = solve(error, cost, max_cost=limit + 1e-9, fixed=group, share=share, weight=weight)
        value = (error.gather(-1, found.choice.unsqueeze(-1)).sum((1, 2)) * weight).sum()
        assert value <= worth[alone <= limit + 1e-9].min() + 1e-6
        used = torch.zeros(6, 4).scatter_(1, found.choice, 1.0)
        paid = cost.gather(-1, found.choice.unsqueeze(-1)).mean((1, 2)) + (group * used).sum(1)
        assert found.cost == pytest.approx(float(paid @ share), abs=1e-6)


def test_probes_let_errors_count_for_what_they_do_to_the_picture():
    """Both layers err alike; one of them changes the picture nine times as much."""
    found = held([0.04, 0.0], [0.2, 1.0], heads=1, parts=2, change=[[0.09, 0.01]])
    found.probed = [(0, 0, 0), (0, 0, 1)]
    assert found.probe == 0
    torch.testing.assert_close(found.weight(), torch.tensor([[0.09, 0.01]], dtype=torch.float64) / 0.04)
    best = assign(found, max_density=0.6)
    assert best.choice.tolist() == [[[1], [0]]]
    assert best.change == pytest.approx(0.01)
    found.change[:] = found.change.flip(1)
    assert assign(found, max_density=0.6).choice.tolist() == [[[0], [1]]]
    assert assign(found, max_density=0.6, weighted=False).change is None


def test_finalists_differ_and_the_closest_is_taken():
    found = held([0.04, 0.01, 0.0], [0.2, 0.5, 1.0], heads=1, parts=2, change=[[0.09, 0.01]])
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


def test_parts_of_layers_and_schedules_of_probes():
    assert layer_parts(5, 2) == [slice(0, 2), slice(2, 5)]
    assert layer_parts(2, 4) == [slice(0, 1), slice(1, 2)]
    assert layer_parts(3, 0) == []
    schedule = Schedule.make(dense_steps=[[0, 2]], dense_layers=[[4, 5]], layer_groups=[[0, 2]])
    probe = only(schedule, 8, range(1, 5), 6, slice(2, 6))
    sparse = {(n, s) for n in range(6) for s in range(8) if probe.dense_reason(n, s, 0.5, 99) is None}
    assert sparse == set(itertools.product([2, 3, 5], [2, 3, 4]))
    assert probe.layer_groups == ()


def test_ranges_of_steps_part_those_that_are_not_dense():
    plan = small_plan(ranges=3, generation=Generation(**SIZES | {"num_inference_steps": 9}))
    assert [list(plan.steps_of(at)) for at in range(3)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]  # step 1 is dense
    assert plan.starts == (4, 6)
    with pytest.raises(ConfigError, match="--step-ranges"):
        _ = small_plan(ranges=3).starts


def test_times_are_those_of_the_whole_layer_and_of_half_its_heads():
    seen = dense_call()
    found = layer_times(list(METHODS.values()), seen)
    assert found.shape == (4, len(METHODS))
    assert (found[[0, 2]] > 0).all()
    assert found[1, 3] == found[3, 3] == 0  # dense has no order
    assert found[1, 0] > 0  # tiles have


def test_every_layer_is_timed_once_per_prompt(tmp_path):
    found = measure(random_wan_pipeline(), small_plan(share=1.0), tmp_path / "s.safetensors", lambda line: None)
    seen = found.calls.sum(0) > 0
    assert found.timings[seen].tolist() == [2.0] * int(seen.sum())
    assert (found.time[seen][:, [0, 2]] > 0).all()
    again = Statistics.load(tmp_path / "s.safetensors", small_plan(share=1.0).settings())
    assert torch.equal(again.time, found.time)


def test_the_preset_runs_and_keeps_the_predicted_density(tmp_path):
    plan, pipe = small_plan(share=1.0), random_wan_pipeline()
    sums = measure(pipe, plan, tmp_path / "s.safetensors", lambda line: None)
    lowest, highest = float(sums.mean_density().amin(-1).mean()), float(sums.mean_density().amax(-1).mean())
    found = assign(sums, max_density=(lowest + highest) / 2)
    write_preset(tmp_path / "mine.yaml", plan, found, sums)
    preset = load_preset(tmp_path / "mine.yaml")
    assert preset.schedule.head_table == head_table(found, plan.candidates)
    assert preset.generation == plan.generation
    assert preset.schedule.dense_steps == ((1, 2),)
    assert "2 prompts" in preset.source
    assert "&" not in (tmp_path / "mine.yaml").read_text()
    pipe.set_progress_bar_config(disable=True)
    sizes = {key: value for key, value in SIZES.items() if key != "fps"}
    with dit_accel.accelerate(pipe, preset, break_even=1.0, dense_steps=0) as acceleration:
        pipe(prompt="x", **sizes, output_type="latent", generator=torch.Generator().manual_seed(1000))
        report = acceleration.report()
    assert {call.reason for call in report.calls} == {None}
    assert report.density == pytest.approx(found.cost, abs=0.02)


def test_the_command_measures_once_and_solves_again(pipeline_folder, tmp_path, monkeypatch, capsys):
    base = tmp_path / "small.yaml"
    base.write_text(
        "extends: tiny-wan/composed\nschedule: {dense_steps: 0}\n"
        "generation: {height: 32, width: 32, num_frames: 5, num_inference_steps: 1}\n"
    )
    target = tmp_path / "mine.yaml"
    fixed = ["--preset", base, "--model", pipeline_folder, "--num-prompts", 1, "--output", target]
    fixed += ["--candidates", "composed:density=0.3,tile=[2,3,3]", "--candidates", "dense"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit-accel", "calibrate", *map(str, [*fixed, *arguments])])
        with pytest.raises(SystemExit) as left:
            main.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, " ".join(captured.err.split())

    code, out, err = call("--max-error", 0)
    assert code == 0, err
    assert "prompt 1 of 1" in err
    assert "predicted error 0.0000 at density 1.000" in out
    code, out, err = call("--density", 0.9)
    assert code == 0, err
    assert "prompt 1 of 1" not in err
    assert load_preset(target).schedule.head_table is not None
    assert call()[0] == 2
    assert call("--max-error", 0.1, "--density", 0.5)[0] == 2
    assert "at least" in call("--density", 0.01)[2]
