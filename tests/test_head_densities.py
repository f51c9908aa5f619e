"""Heads of one layer at densities of their own: one call, one order, and what each head would compute by itself."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.guard import Guard
from dit_accel.head_densities import at_density, merged, without_density
from dit_accel.head_table import HeadGroup
from dit_accel.layer_methods import LayerMethods
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.planner import PlanRequest
from dit_accel.schedule import Schedule
from dit_accel.shard import HeadShard
from dit_accel.state import RunState

GRID = (2, 6, 7)
SMALL = {"block": 8, "query_block": 16, "clusters": 5}
MODES = {
    "few": {"method": "aurora", "parameters": {**SMALL, "density": 0.1}},
    "some": {"method": "aurora", "parameters": {**SMALL, "density": 0.3}},
    "many": {"method": "aurora", "parameters": {**SMALL, "density": 0.6}},
    "tiles": {"method": "composed", "parameters": {"tile": [1, 3, 3], "density": 0.3}},
}


def tensors(heads=4, dim=8, seed=0):
    tokens, generator = GRID[0] * GRID[1] * GRID[2], torch.Generator().manual_seed(seed)
    return tuple(torch.randn(1, tokens, heads, dim, generator=generator) for _ in range(3))


def engine(rows, later=(), **options):
    table = {"modes": MODES, "heads": [rows], "later": [{"step": step, "heads": [row]} for step, row in later]}
    return Engine(get_method("dense"), Schedule.make(head_table=table), [nn.Identity()], break_even=1.0, **options)


def attend(made, step=0, branch="cond", seed=0):
    made.begin(RunState(GRID, step, 1 - step / 10, branch))
    (layer,) = made._layer_of
    return made.attend(layer, *tensors(seed=seed), dense=lambda: torch.full((1,), torch.nan))


def counted(monkeypatch, name="order"):
    """The shapes of the queries that were ordered."""
    cls, seen = type(get_method("aurora")), []
    real = getattr(cls, name)
    monkeypatch.setattr(cls, name, lambda self, q, *rest: seen.append(tuple(q.shape[:2])) or real(self, q, *rest))
    return seen


def test_heads_of_different_density_share_one_call_and_compute_what_they_would_alone(monkeypatch):
    rows = ["few", "some", "many", "few"]
    engines = [engine([name] * 4) for name in rows]
    alone = [attend(made) for made in engines]
    ordered, made = counted(monkeypatch), engine(rows)
    out = attend(made)
    assert ordered == [(1, 4)]
    for head, expected in enumerate(alone):
        torch.testing.assert_close(out[:, :, head], expected[:, :, head])
    assert made.calls[-1].density == pytest.approx(sum(each.calls[-1].density for each in engines) / 4, abs=0.01)


def test_only_methods_that_are_alike_but_for_density_become_one():
    few, some, many, tiles = (get_method(mode["method"], **mode["parameters"]) for mode in MODES.values())
    groups = [HeadGroup(few, (0, 5)), HeadGroup(tiles, (1,)), HeadGroup(many, (2, 4)), HeadGroup(None, (3,))]
    one, other, none = merged(groups)
    assert (one.heads, one.method.densities) == ((0, 2, 4, 5), (0.1, 0.6, 0.6, 0.1))
    assert one.method.requested_density == pytest.approx(0.35)
    assert (other, none) == (groups[1], groups[3])
    assert without_density(one.method) == without_density(some) != without_density(tiles)
    assert hash(without_density(one.method)) == hash(without_density(some))
    for options in ({"mass": 0.5}, {"heads": "adaptive"}, {"scope": "layer"}, {"density": None, "tau": 1.0}):
        fixed = get_method("composed", **options)
        assert without_density(fixed) is fixed
        with pytest.raises(ConfigError, match="densities"):
            get_method("composed", densities=[0.2, 0.4], **options)
    radial = get_method("radial")
    assert without_density(radial) is radial


def test_densities_are_one_per_head():
    made = get_method("composed", tile=[1, 3, 3], densities=[0.2, 0.4, 0.9])
    q, k, v = (x.transpose(1, 2) for x in tensors(heads=4))
    with pytest.raises(ConfigError, match="one value per head"):
        made.plan(TokenLayout(GRID), q, k, v)
    found = made.plan(TokenLayout(GRID), q[:, :3], k[:, :3])[1].density_per_head()[0]
    for head, density in enumerate(made.densities):
        alone = get_method("composed", tile=[1, 3, 3], density=density)
        assert found[head] == pytest.approx(alone.plan(TokenLayout(GRID), q, k)[1].density_per_head()[0, head])


def test_another_density_at_a_later_step_goes_on_with_the_order(monkeypatch):
    ordered, made = counted(monkeypatch, name="order"), engine(["few"] * 4, [(1, ["some", "many", "few", "few"])])
    memory = [
        made._planner.call(PlanRequest(group.method, 0, layout, made.running, group=group.key), 1).branches
        for layout, group in _calls(made)
    ]
    assert memory[0] is memory[1]
    assert memory[0]["order"] is not None
    assert len(ordered) == 2


def _calls(made):
    """Layout and group of two calls at steps of different densities."""
    for step in (0, 1):
        attend(made, step, seed=step)
        (group,) = made.methods.groups(0, HeadShard(0, 4, 4), torch.device("cpu"), step)
        assert group.heads is None
        yield made._layout(made.running, "none", 84), group


def test_other_heads_under_the_same_method_do_not_go_on_with_the_order():
    rows, later = ["few", "few", "tiles", "tiles"], ["tiles", "tiles", "few", "few"]
    made = engine(rows, [(1, later)])
    attend(made, 0)
    torch.testing.assert_close(attend(made, 1, seed=1), attend(engine(later), 1, seed=1))


def test_a_shard_of_the_heads_takes_its_own_densities():
    table = {"modes": MODES, "heads": [["few", "some", "many", "few"]]}
    methods = LayerMethods(get_method("dense"), Schedule.make(head_table=table), 1)
    (group,) = methods.groups(0, HeadShard(1, 2, 4), torch.device("cpu"))
    assert (group.method.densities, group.heads) == ((0.3, 0.6), None)


def test_the_guard_raises_all_heads_alike():
    made = get_method("aurora", densities=[0.1, 0.3, 0.8])
    assert at_density(made, 0.6).densities == pytest.approx((0.15, 0.45, 1.0))
    assert at_density(get_method("aurora"), 0.6).density == 0.6
    guard = Guard(1e-6)
    q, k, v = torch.randn(3, 1, 3, 4096, 8, generator=torch.Generator().manual_seed(0))
    guard.check((0, "cond"), 0, q, k, v, torch.zeros_like(q), TokenLayout((16, 16, 16)), 0.4)
    guard.max_error = 0.9  # a zero output errs by 1: one level
    (raised,), level, reason = guard.choose((0, "cond"), (made,), 1, 4096)
    assert (level, reason) == (1, None)
    assert raised.densities == pytest.approx((0.15, 0.45, 1.0))


def test_densities_of_a_mode_are_those_of_its_heads():
    own = get_method("composed", densities=[0.1, 0.5])
    (group,) = merged([HeadGroup(own, (0, 2)), HeadGroup(get_method("composed", density=0.3), (1,))])
    assert (group.heads, group.method.densities) == ((0, 1, 2), (0.1, 0.3, 0.5))


@pytest.mark.parametrize(
    ("name", "parameters", "cut"),
    [
        ("composed", {"densities": [0.1, 0.2, 0.3, 0.4]}, {"densities": (0.3, 0.4)}),
        ("paro", {"axes": ["fhw", "hwf", "whf", "fwh"]}, {"axes": ("whf", "fwh")}),
        ("xattention", {"threshold": [0.9, 0.8, 0.7, 0.6]}, {"threshold": (0.7, 0.6)}),
        ("paro", {"axes": ["hwf"]}, {"axes": ("hwf",)}),
    ],
)
def test_a_shard_of_the_heads_takes_its_own_parameters(name, parameters, cut):
    method, q = get_method(name, block=8, **parameters), [x.transpose(1, 2) for x in tensors(heads=4)]
    methods = LayerMethods(method, Schedule(), 1)
    methods.check_model([4])
    (group,) = methods.groups(0, HeadShard(2, 2, 4), torch.device("cpu"))
    assert {key: getattr(group.method, key) for key in cut} == cut
    whole, half = method.plan(TokenLayout(GRID), *q), group.method.plan(TokenLayout(GRID), *(x[:, 2:] for x in q))
    assert torch.equal(whole[1].to_mask()[:, 2:], half[1].to_mask())
    assert methods.groups(0, HeadShard(0, 4, 4), torch.device("cpu"))[0].method == method


BY_HEAD = {
    "thresholds": {"method": "xattention", "parameters": {"threshold": [0.3, 0.5, 0.7, 0.9], "block": 8}},
    "axes": {"method": "paro", "parameters": {"axes": ["fhw", "whf"], "block": 8}},
    "densities": {"method": "composed", "parameters": {"densities": [0.1, 0.2, 0.6], "tile": [1, 3, 3]}},
    "density": {"method": "composed", "parameters": {"density": 0.5, "tile": [1, 3, 3]}},
    "dense": {"method": "dense"},
}
ROWS = {
    "thresholds": ["thresholds"] * 4,
    "axes": ["axes", "dense", "dense", "axes"],
    "axes in one process": ["axes", "axes", "dense", "dense"],
    "densities": ["densities", "densities", "densities", "density"],
    "densities apart": ["densities", "density", "densities", "densities"],
}


@pytest.mark.parametrize("name", ROWS)
def test_what_a_mode_says_head_by_head_is_cut_for_a_process(name):
    used = {mode: BY_HEAD[mode] for mode in set(ROWS[name])}
    schedule, layers = Schedule.make(head_table={"modes": used, "heads": [ROWS[name]]}), [nn.Identity()]
    made = Engine(get_method("dense"), schedule, layers, break_even=1.0)
    made.methods.check_model([4])
    made.methods.check_shares(4, 2)
    made.begin(RunState(GRID, 0, 0.5))
    qkv, unused = tensors(), lambda: torch.full((1,), torch.nan)
    whole = made.attend(layers[0], *qkv, dense=unused)
    for first in (0, 2):
        mine = [x[:, :, first : first + 2] for x in qkv]
        found = made.attend(layers[0], *mine, dense=unused, shard=HeadShard(first, 2, 4))
        torch.testing.assert_close(found, whole[:, :, first : first + 2])


def test_what_some_process_cannot_hold_at_some_step_is_refused_before_a_model_is_loaded(tmp_path):
    q, k, _ = (x.transpose(1, 2) for x in tensors(heads=2))
    get_method("paro", block=8).plan(TokenLayout(GRID), q, k)[1].save(tmp_path / "plan.safetensors")
    saved = {"method": "paro", "parameters": {"block": 8, "plan_file": str(tmp_path / "plan.safetensors")}}
    modes, later = {"saved": saved, "dense": {"method": "dense"}}, ["dense", "dense", "saved", "saved"]
    for row, known in ((later, True), (["dense", "saved", "saved", "dense"], False)):
        table = {"modes": modes, "heads": [["dense"] * 4], "later": [{"step": 3, "heads": [row]}]}
        methods = LayerMethods(get_method("dense"), Schedule.make(head_table=table), 1)
        methods.check_model([4])
        if known:
            methods.check_shares(4, 2)
            continue
        with pytest.raises(ConfigError, match="expected all heads in one process"):
            methods.check_shares(4, 2)


def test_representatives_of_a_shard_are_those_of_all_heads():
    layers, method = [nn.Identity()], get_method("composed", tile=[1, 3, 3], density=0.3)
    made = Engine(method, Schedule.make(head_groups=2), layers, break_even=1.0)
    made.begin(RunState(GRID, 0, 0.5))
    q, k, v = tensors()
    whole = made.attend(layers[0], q, k, v, dense=lambda: torch.full((1,), torch.nan))
    half = [x[:, :, 2:] for x in (q, k, v)]
    found = made.attend(layers[0], *half, dense=lambda: torch.full((1,), torch.nan), shard=HeadShard(2, 2, 4))
    torch.testing.assert_close(found, whole[:, :, 2:])
    with pytest.raises(ConfigError, match="groups of 2 heads: use more of them, or fewer processes"):
        made.attend(layers[0], *(x[:, :, :1] for x in half), dense=lambda: None, shard=HeadShard(2, 1, 4))


def test_a_plan_file_of_all_heads_is_refused_where_a_process_holds_some(tmp_path):
    q, k, _ = (x.transpose(1, 2) for x in tensors())
    get_method("paro", block=8).plan(TokenLayout(GRID), q, k)[1].save(tmp_path / "plan.safetensors")
    method = get_method("paro", block=8, plan_file=str(tmp_path / "plan.safetensors"))
    assert method.of_heads(HeadShard(0, 4, 4)) is method
    with pytest.raises(ConfigError, match="expected all heads in one process"):
        method.of_heads(HeadShard(0, 2, 4))
