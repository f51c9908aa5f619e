"""Calibration of layer groups: what it measures, that the grouping is the best, and that the preset runs."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch

import dit_accel
from dit_accel.calibrate.layers import LayerObserver, solve_groups
from dit_accel.calibrate.observer import Observer
from dit_accel.calibrate.statistics import Statistics
from dit_accel.cli import main
from dit_accel.engine import DenseCall
from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.presets import load_preset
from dit_accel.reuse import union_of_heads
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

LAYOUT = TokenLayout((3, 5, 7))
METHOD = get_method("composed", order="raster", block=16, density=0.3)


def dense_call(layer, step=0, heads=3):
    generator = torch.Generator().manual_seed(10 * step + layer)
    q, k, v = (torch.randn(1, heads, LAYOUT.tokens, 8, generator=generator) for _ in range(3))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return DenseCall("transformer", layer, RunState(LAYOUT.grid, step, 0.5), LAYOUT, q, k, v, out)


def groupings(layers, reach):
    """All ways to cut a row of layers into groups of at most reach + 1."""
    for cuts in itertools.product([False, True], repeat=layers - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), layers]
        if max(b - a for a, b in itertools.pairwise(edges)) <= reach + 1:
            yield list(itertools.pairwise(edges))


def random_errors(seed, layers=6, reach=3):
    error = torch.rand(layers, reach + 1, generator=torch.Generator().manual_seed(seed)).double().sort(1).values
    for layer, back in itertools.product(range(layers), range(reach + 1)):
        if back > layer:
            error[layer, back] = math.inf
    return error


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stands_dense", [None, 2])
def test_no_grouping_within_the_budget_has_fewer_plans_or_less_error(seed, stands_dense):
    error, seen = random_errors(seed), [layer != stands_dense for layer in range(6)]
    everything = []
    for groups in groupings(6, 3):
        if any(b - a > 1 and not all(seen[a:b]) for a, b in groups):
            continue
        total = sum(float(error[i, i - a]) for a, b in groups for i in range(a, b) if seen[i])
        everything.append((sum(seen[a] for a, _ in groups), math.sqrt(total / sum(seen))))
    for budget in (0.5, 0.6, 0.7, 0.9):
        within = [case for case in everything if case[1] <= budget]
        if not within:
            with pytest.raises(ConfigError, match="expected at least"):
                solve_groups(error, seen, budget)
            continue
        found = solve_groups(error, seen, budget)
        assert (found.plans, found.error) == (min(within)[0], pytest.approx(min(within)[1]))
        assert all(b - a > 1 for a, b in found.groups)
        assert found.plans == found.layers - sum(b - a - 1 for a, b in found.groups)


@pytest.mark.parametrize("layer_heads", ["union", "index"])
def test_the_errors_are_those_of_earlier_layers_plans(layer_heads):
    sums = Statistics.empty(4, 1, 3)
    observer = LayerObserver(METHOD, 2, layer_heads, Schedule(dense_layers=((2, 3),)), sums)
    calls = [dense_call(layer) for layer in range(4)]
    for call in calls:
        observer(call)
    assert sums.calls.tolist() == [[1, 1, 0, 1]]
    plans = [METHOD.plan(LAYOUT, call.q, call.k)[1] for call in calls]
    for layer, back in ((0, 0), (1, 0), (1, 1), (3, 0), (3, 2)):
        plan, call = plans[layer - back], calls[layer]
        plan = union_of_heads(plan) if back and layer_heads == "union" else plan
        out = block_attention(
            call.q.double(), call.k.double(), call.v.double(), plan, remainder=METHOD.remainder, backend="reference"
        )
        wrong = float((out - call.out).square().sum() / call.out.square().sum())
        assert float(sums.error[0, layer, 0, back]) == pytest.approx(wrong, rel=1e-4)
        assert float(sums.density[0, layer, 0, back]) == pytest.approx(float(plan.density), rel=1e-5)
    # Layer 2 stays dense and leaves no plan; before layer 0 there is none.
    assert torch.isinf(sums.error[0, 3, 0, 1])
    assert torch.isinf(sums.error[0, 0, 0, 1:]).all()


def test_a_new_forward_pass_forgets_the_plans_of_the_last():
    sums = Statistics.empty(2, 1, 2)
    observer = LayerObserver(METHOD, 1, "index", Schedule(), sums)
    for step in (0, 1):
        observer(dense_call(0, step))
    assert torch.isinf(sums.error[0, 0, 0, 1])


@pytest.mark.parametrize("layer_heads", ["union", "index"])
def test_what_a_method_keeps_goes_with_the_plan_that_left_it(layer_heads):
    """With its own plan a layer does as it does alone, whatever those of other layers leave behind."""
    method = get_method("composed", order="raster", block=16, density=0.3, remainder="history", period=3, ramp=0.0)
    sums, alone = Statistics.empty(3, 1, 3), Statistics.empty(3, 3, 1)
    observers = [
        LayerObserver(method, 2, layer_heads, Schedule(), sums),
        Observer([method], Schedule(), alone),
    ]
    for step, layer in itertools.product(range(5), range(3)):
        call = dense_call(layer, step)
        for observer in observers:
            observer(call)
    torch.testing.assert_close(sums.error[0, :, 0, 0], alone.error[0, :, :, 0].sum(1))
    torch.testing.assert_close(sums.density[0, :, 0, 0], alone.density[0, :, :, 0].mean(1))
    if layer_heads == "index":  # a union of heads is denser
        torch.testing.assert_close(sums.density[0, 1:, 0, 1], sums.density[0, :-1, 0, 0])


def test_static_methods_have_nothing_to_share():
    with pytest.raises(ConfigError, match="radial"):
        LayerObserver(get_method("radial"), 1, "union", Schedule(), Statistics.empty(1, 1, 2))


def test_the_command_writes_groups_that_run(tmp_path, monkeypatch, capsys):
    folder, target, base = tmp_path / "model", tmp_path / "mine.yaml", tmp_path / "small.yaml"
    pipe = random_wan_pipeline()
    pipe.save_pretrained(folder)
    base.write_text(
        "extends: tiny-wan/composed\nschedule: {dense_steps: 0}\n"
        "generation: {height: 32, width: 32, num_frames: 5, num_inference_steps: 1}\n"
    )
    fixed = ["--preset", base, "--model", folder, "--num-prompts", 1, "--output", target, "--layer-reuse", 1]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit-accel", "calibrate", *map(str, [*fixed, *arguments])])
        with pytest.raises(SystemExit) as left:
            main.main()
        return left.value.code or 0, capsys.readouterr().out

    code, out = call("--max-error", 100)
    assert code == 0
    layers = len(pipe.transformer.blocks)
    preset = load_preset(target)
    assert preset.schedule.layer_groups
    assert f"{math.ceil(layers / 2)} plans per step for {layers} layers" in out
    assert preset.method == load_preset(base).method
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, preset, break_even=1.0) as acceleration:
        pipe("x", height=32, width=32, num_frames=5, num_inference_steps=1, output_type="latent")
        calls = acceleration.report().calls
    assert {call.reason for call in calls} == {None}
    assert call("--density", 0.5)[0] == 2
    assert call("--max-error", 0.5, "--candidates", "radial")[0] == 2
