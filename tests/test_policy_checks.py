"""What does not go together is refused before a model is loaded, or where it takes a model, before it runs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.layer_methods import check_policy
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods
from dit_accel.presets import load_preset
from dit_accel.resolve import resolve_policy, second_schedule
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

GRID = (3, 8, 8)
SCHEDULES = {
    "union": {"layer_groups": [[0, 2]]},
    "index": {"layer_groups": [[0, 2]], "layer_heads": "index"},
    "representatives": {"head_groups": 2},
    "both": {"head_groups": 2, "layer_groups": [[0, 2]]},
    "kept": {"refresh": 2},
    "searched": {"search_steps": [0], "dense_steps": 1},
}
ORDERED_BY_HEAD = {"aurora", "pbs", "svg", "svg2"}


class Layer(nn.Module):
    """An attention layer, of which the number of heads is known."""

    def __init__(self, heads):
        super().__init__()
        self.heads = heads


def run(method, schedule, heads=4):
    """Two steps of two layers, both branches; the densities that were computed."""
    layers = [Layer(heads), Layer(heads)]
    engine = Engine(method, schedule, layers, break_even=1.0)
    generator = torch.Generator().manual_seed(0)
    for step in range(2):
        for branch in ("cond", "uncond"):
            engine.begin(RunState(GRID, step, 1 - step / 10, branch))
            for layer in layers:
                q, k, v = torch.randn(3, 1, 192, heads, 16, generator=generator)
                assert engine.attend(layer, q, k, v, dense=lambda q=q: torch.zeros_like(q)).isfinite().all()
    return [call.reason for call in engine.calls]


@pytest.mark.parametrize("timing", SCHEDULES)
@pytest.mark.parametrize("name", list_methods())
def test_what_is_not_refused_at_once_runs(name, timing):
    asked = dict(SCHEDULES[timing])
    if name in ORDERED_BY_HEAD and timing in ("union", "both"):
        with pytest.raises(ConfigError, match=r"schedule\.layer_heads: .* use 'index'"):
            resolve_policy(None, name, None, asked)
        return
    reasons = run(*resolve_policy(None, name, None, asked))
    assert name == "dense" or None in reasons


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("composed", {"order": "axes", "axes": ["hwf", "fhw", "wfh", "fhw"], "block": 16}),
        ("paro", {"axes": ["hwf", "fhw"]}),
        ("composed", {"order": "lsh"}),
        ("pbs", {"order": "hot_keys"}),
    ],
)
def test_orders_per_head_have_no_union_wherever_a_schedule_comes_from(name, parameters):
    method, united = get_method(name, **parameters), Schedule.make(layer_groups=[[0, 2]])
    with pytest.raises(ConfigError, match=r"schedule\.layer_heads: 'union' needs one order for all heads"):
        resolve_policy(None, method, united, {})
    with pytest.raises(ConfigError, match="layer_heads"):
        second_schedule(None, None, united, {}, ("transformer_2",), method)
    check_policy(method, Schedule.make(layer_groups=[[0, 2]], layer_heads="index"))


def test_a_preset_is_refused_when_it_is_loaded(tmp_path):
    path = tmp_path / "united.yaml"
    path.write_text("extends: wan2.1-t2v-1.3b-480p\nname: united\nmethod: {name: svg2}\nschedule: {layer_groups: 4}\n")
    with pytest.raises(ConfigError, match=r"schedule\.layer_heads: .*svg2"):
        load_preset(path)


def test_only_layers_of_a_group_count():
    """An override that orders each head is refused in a group, and nowhere else."""
    method = get_method("composed")
    changed = {"parameters": {"order": "kmeans"}}
    for layers, groups in (([[4, 6]], [[0, 4]]), ([[0, 4]], [[4, 8]])):
        check_policy(method, Schedule.make(layer_groups=groups, overrides=[{"layers": layers, **changed}]))
    for layers in ([[2, 3]], [[0, 1]], [[3, 9]], [[0, 9]]):
        with pytest.raises(ConfigError, match="layer_heads"):
            check_policy(method, Schedule.make(layer_groups=[[0, 4]], overrides=[{"layers": layers, **changed}]))


@pytest.mark.parametrize(
    ("name", "parameters", "timing", "message"),
    [
        ("composed", {"order": "axes", "axes": ["fhw", "hwf"]}, {}, "method.composed.axes: expected 1 or 4"),
        (
            "composed",
            {"densities": [0.1, 0.2, 0.3]},
            {},
            "method.composed.densities: expected one value per head, 4, got 3",
        ),
        ("composed", {"densities": [0.1] * 4}, {"head_groups": 2}, "densities: expected one value per head, 2, got 4"),
        ("xattention", {"threshold": [0.9, 0.8]}, {}, "method.xattention.threshold: expected 4 values"),
        ("composed", {}, {"head_groups": 3}, "schedule.head_groups: expected a divisor of the 4 heads, got 3"),
        ("composed", {}, {"head_table": {"modes": {"a": {}}, "heads": [["a"] * 3] * 2}}, "the table is for 3 heads"),
        ("composed", {}, {"head_table": {"modes": {"a": {}}, "heads": [["a"] * 4]}}, "the table is for 1 layers"),
        ("sla", {"projections": "nowhere.safetensors"}, {}, "method.sla.projections: .*nowhere"),
        ("paro", {"plan_file": "nowhere.safetensors"}, {}, "method.paro.plan_file: .*nowhere"),
    ],
)
def test_what_is_for_another_model_is_refused_before_it_runs(name, parameters, timing, message):
    with pytest.raises(ConfigError, match=message):
        Engine(get_method(name, **parameters), Schedule.make(**timing), [Layer(4), Layer(4)])


def test_a_saved_plan_for_other_heads_is_refused_before_it_runs(tmp_path):
    path = tmp_path / "plan.safetensors"
    plan = get_method("paro", block=16).plan(*planned(heads=3))[1]
    plan.save(path)
    method = get_method("paro", block=16, plan_file=str(path))
    with pytest.raises(ConfigError, match="expected a plan for 4 heads, got one for 3"):
        Engine(method, Schedule(), [Layer(4)])
    Engine(method, Schedule(), [Layer(3)])


def planned(heads):
    layout = TokenLayout(GRID)
    return layout, *torch.randn(2, 1, heads, layout.tokens, 16, generator=torch.Generator().manual_seed(0))
