"""What a call asks for runs: a method before a preset's head table, a density before densities."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_accel.cli.overrides import override_method
from dit_accel.compare.candidates import parse_candidate
from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.layer_methods import LayerMethods, method_of_layer
from dit_accel.methods.registry import get_method
from dit_accel.presets import MethodSpec, load_preset
from dit_accel.resolve import resolve_policy, second_schedule
from dit_accel.schedule import Schedule
from dit_accel.shard import HeadShard

AURORA = {"method": "aurora", "parameters": {"density": 0.1}}
OVERRIDES = [{"layers": [[0, 2]], "parameters": {"density": 0.9}}]


def composed_preset(**changes):
    """A preset whose own method is `composed`."""
    return load_preset("tiny-wan").model_copy(update={"method": MethodSpec(name="composed"), **changes})


def preset_with(modes, experts=1, **changes):
    """A preset all of whose heads take turns in `modes`."""
    preset = composed_preset()
    names = [f"mode{n}" for n in range(len(modes))]
    row = [names[head % len(names)] for head in range(preset.model.heads)]
    table = {"modes": dict(zip(names, modes, strict=True)), "heads": [row] * preset.model.layers}
    schedule = Schedule.make(dense_steps=2, head_table=table, **changes)
    return preset.model_copy(update={"schedule": schedule, "schedule_2": schedule if experts == 2 else None})


def running(preset, method, schedule):
    """Names and densities of what runs in all heads of all layers."""
    layers, heads = preset.model.layers, preset.model.heads
    methods = LayerMethods(method, schedule, layers)
    groups = [methods.groups(layer, HeadShard(0, heads, heads), torch.device("cpu")) for layer in range(layers)]
    return {(group.method.name, group.method.requested_density) for each in groups for group in each}


def test_a_method_of_the_call_runs_in_place_of_the_table_of_a_preset():
    preset = preset_with([AURORA])
    for asked in ("dense", get_method("dense")):
        method, schedule = resolve_policy(preset, asked, None, {})
        assert Engine(method, schedule, [nn.Identity()] * preset.model.layers).is_dense
    changed = override_method(preset, "radial", {"density": None})
    assert running(preset, *resolve_policy(changed, None, None, {})) == {("radial", None)}
    assert changed.schedule.dense_steps == ((0, 2),)
    assert running(preset, *resolve_policy(preset, None, None, {})) == {("aurora", 0.1)}


@pytest.mark.parametrize(
    ("text", "expected"), [("radial", ("radial", None)), ("composed:density=0.5", ("composed", 0.5))]
)
def test_a_candidate_runs_what_its_label_says(text, expected):
    preset = preset_with([AURORA], experts=2)
    candidate = parse_candidate(text, preset)
    for schedule in (candidate.schedule, candidate.options["schedule_2"]):
        assert running(preset, candidate.method, schedule) == {expected}


def test_a_table_of_the_call_stays():
    table = preset_with([AURORA]).schedule.head_table
    for schedule, parameters in (({"head_table": table}, {}), (None, {"head_table": table})):
        assert resolve_policy(preset_with([AURORA]), "radial", schedule, parameters)[1].head_table == table


def test_the_second_expert_follows_the_call_too():
    preset = preset_with([AURORA], experts=2)
    method = get_method("radial")
    asked = second_schedule(preset, None, None, {}, ("transformer_2",), method, "radial")
    assert (asked.head_table, asked.dense_steps) == (None, ((0, 2),))
    assert second_schedule(preset, None, None, {}, ("transformer_2",), method).head_table is not None
    assert override_method(preset, "radial", {}).schedule_2.head_table is None


@pytest.mark.parametrize("experts", [1, 2])
@pytest.mark.parametrize("modes", [[AURORA], [AURORA, {"parameters": {"density": 0.2}}]])
def test_a_parameter_that_no_head_would_heed_is_refused(modes, experts):
    preset = preset_with(modes, experts)
    with pytest.raises(ConfigError, match=r"^density: the head table of preset .* decides it .* name a method"):
        resolve_policy(preset, None, None, {"density": 0.5})
    with pytest.raises(ConfigError, match="density"):
        override_method(preset, None, {"density": 0.5})


@pytest.mark.parametrize("without", ["schedule", "schedule_2"])
def test_a_parameter_that_one_expert_heeds_is_taken(without):
    preset = preset_with([AURORA], 2).model_copy(update={without: Schedule()})
    assert resolve_policy(preset, None, None, {"density": 0.5})[0].density == 0.5


def test_a_parameter_that_a_second_schedule_of_the_call_heeds_is_taken():
    preset = preset_with([AURORA], 2)
    assert resolve_policy(preset, None, None, {"density": 0.5}, {"dense_steps": 1})[0].density == 0.5
    with pytest.raises(ConfigError, match=r"^density: the head table"):
        resolve_policy(preset, None, None, {"density": 0.5}, preset.schedule)


def test_a_parameter_that_some_heads_heed_is_taken():
    preset = preset_with([{}, AURORA])
    method, schedule = resolve_policy(preset, None, None, {"density": 0.5})
    assert running(preset, method, schedule) == {("composed", 0.5), ("aurora", 0.1)}


def test_overrides_are_for_the_method_of_the_preset():
    preset = composed_preset(schedule=Schedule.make(overrides=OVERRIDES))
    assert running(preset, *resolve_policy(preset, "aurora", None, {"density": 0.2})) == {("aurora", 0.2)}
    assert resolve_policy(preset, "dense", None, {})[1].overrides == ()
    same = running(preset, *resolve_policy(preset, "composed", None, {"density": 0.2}))
    assert same == {("composed", 0.9), ("composed", 0.2)}


def test_a_density_of_the_call_takes_the_place_of_densities():
    own = {"density": 0.1, "densities": (0.1, 0.3)}
    preset = composed_preset(method=MethodSpec(name="composed", parameters=own), schedule=Schedule())
    for given, asked in ((preset, None), (None, get_method("composed", **own))):
        assert resolve_policy(given, asked, None, {"density": 0.5})[0].requested_density == 0.5
        assert resolve_policy(given, asked, None, {"block": 32})[0].requested_density == pytest.approx(0.2)
    layers = Schedule.make(overrides=OVERRIDES)
    assert method_of_layer(get_method("composed", **own), layers, 0).requested_density == 0.9
