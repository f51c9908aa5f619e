"""Per-head tables: files, refusals, and heads that run under different methods in one call."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from dit_accel import parts, planner
from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.head_table import HeadTable
from dit_accel.methods.registry import get_method
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

GRID = (3, 5, 6)
MODES = {
    "full": {"method": "dense"},
    "none": {"method": "skip"},
    "near": {"method": "sliding_tile", "parameters": {"tile": [1, 2, 2], "window": [3, 1, 1]}},
    "own": {"parameters": {"density": 0.5}},
}
TABLE = {"modes": MODES, "heads": [["full", "none", "near", "own"], ["near", "near", "full", "near"]]}


def tensors(batch=2, heads=4, dim=8):
    tokens = GRID[0] * GRID[1] * GRID[2]
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, tokens, heads, dim, generator=generator) for _ in range(3))


def run(layer=0, table=TABLE, method=None, break_even=1.0, backend="auto", **schedule):
    """One call of `layer` through an engine: the output `[B, N, H, D]` and its record."""
    layers = [nn.Identity() for _ in TABLE["heads"]]
    method = method or get_method("composed", tile=[1, 2, 2], density=0.25, remainder="drop")
    engine = Engine(method, Schedule.make(head_table=table, **schedule), layers, backend=backend, break_even=break_even)
    engine.begin(RunState(GRID, 0, 0.5))
    out = engine.attend(layers[layer], *tensors(), dense=lambda: torch.full((1,), torch.nan))
    return out, engine.calls[-1]


def alone(method, head):
    """The same call of one head under `method`."""
    layers = [nn.Identity()]
    engine = Engine(method, Schedule(), layers, break_even=1.0)
    engine.begin(RunState(GRID, 0, 0.5))
    q, k, v = (x[:, :, head : head + 1] for x in tensors())
    return engine.attend(layers[0], q, k, v, dense=lambda: torch.full((1,), torch.nan)), engine.calls[-1].density


def test_every_head_computes_what_it_would_compute_alone():
    out, record = run()
    near = get_method("sliding_tile", tile=[1, 2, 2], window=[3, 1, 1])
    own = get_method("composed", tile=[1, 2, 2], density=0.5, remainder="drop")
    q, k, v = (x.transpose(1, 2) for x in tensors())
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    torch.testing.assert_close(out[:, :, 0], dense[:, :, 0])
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    (third, third_density), (fourth, fourth_density) = alone(near, 2), alone(own, 3)
    torch.testing.assert_close(out[:, :, 2:3], third)
    torch.testing.assert_close(out[:, :, 3:4], fourth)
    assert record.density == pytest.approx((1 + 0 + third_density + fourth_density) / 4)


def test_a_layer_without_a_mode_of_another_layer():
    out, record = run(layer=1)
    expected = torch.cat([alone(get_method("sliding_tile", tile=[1, 2, 2], window=[3, 1, 1]), 0)[0]], 2)
    torch.testing.assert_close(out[:, :, :1], expected)
    assert record.reason is None


def test_all_dense_heads_run_the_stock_path_and_all_skipped_give_zero():
    dense = {"modes": MODES, "heads": [["full"] * 4] * 2}
    out, record = run(table=dense, break_even=None)
    assert out.isnan().all()
    assert record.reason is not None
    assert record.density == 1.0
    out, record = run(table={"modes": MODES, "heads": [["none"] * 4] * 2})
    assert torch.equal(out, torch.zeros_like(tensors()[0]))
    assert record.density == 0.0


def test_heads_above_the_break_even_go_to_dense_attention():
    block_kernels, record = run()
    assert record.backend == "torch"
    mixed, record = run(break_even=0.7)
    assert record.backend == "dense sdpa, torch"
    assert record.reason is None
    torch.testing.assert_close(mixed, block_kernels, atol=1e-6, rtol=1e-6)
    q, k, v = (x.transpose(1, 2)[:, :1] for x in tensors())
    assert torch.equal(mixed[:, :, :1].transpose(1, 2), F.scaled_dot_product_attention(q, k, v))


def test_one_sparse_head_stays_so_among_dense_ones():
    table = TABLE | {"heads": [["full", "full", "full", "own"], ["full"] * 4]}
    out, record = run(table=table, break_even=0.7)
    assert record.reason is None
    own, density = alone(get_method("composed", tile=[1, 2, 2], density=0.5, remainder="drop"), 3)
    assert record.density == pytest.approx((3 + density) / 4)
    assert record.density > 0.7
    q, k, v = (x.transpose(1, 2)[:, :3] for x in tensors())
    assert torch.equal(out[:, :, :3].transpose(1, 2), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(out[:, :, 3:], own)


def test_an_explicit_backend_computes_every_head(monkeypatch):
    monkeypatch.setattr(parts, "dense_attention", None)
    _, record = run(break_even=0.7, backend="torch")
    assert record.backend == "torch"


def test_static_plans_are_shared_by_layers():
    layers = [nn.Identity(), nn.Identity()]
    engine = Engine(
        get_method("radial", block=16), Schedule.make(head_table=TABLE | {"heads": [["near"] * 4] * 2}), layers
    )
    engine.begin(RunState(GRID, 0, 0.5))
    for layer in layers:
        engine.attend(layer, *tensors(), dense=lambda: torch.empty(0))
    assert len(engine._planner._static) == 1


@pytest.mark.parametrize("suffix", ["yaml", "yml", "safetensors"])
def test_a_table_survives_its_file(tmp_path, suffix):
    table, path = HeadTable.make(TABLE), tmp_path / f"table.{suffix}"
    table.save(path)
    assert HeadTable.load(path) == table
    assert Schedule.make(head_table=str(path)).head_table == table
    assert Schedule.make(**Schedule.make(head_table=str(path)).model_dump(exclude_unset=True)).head_table == table


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"heads": [["full", "nonne"], ["full", "full"]]}, r"heads\.0\.1: unknown mode 'nonne'; did you mean 'none'"),
        ({"heads": [["full", "none"], ["full"]]}, r"heads\.1: expected 2 heads, got 1"),
        ({"heads": []}, "at least one layer"),
        ({"modes": MODES | {"near": {"method": "slidng_tile"}}}, "did you mean 'sliding_tile'"),
        ({"modes": MODES | {"near": {"method": "sliding_tile", "parameters": {"tile": 3}}}}, "sliding_tile.tile"),
        ({"modes": MODES | {"none": {"method": "skip", "parameters": {"a": 1}}}}, "a skipped head takes none"),
        ({"mode": {}}, "did you mean 'modes'"),
    ],
)
def test_faults_are_refused_by_path(change, message):
    with pytest.raises(ConfigError, match=message):
        HeadTable.make(TABLE | change)


def test_files_that_are_no_tables(tmp_path):
    path = tmp_path / "table.yaml"
    with pytest.raises(ConfigError, match="no file"):
        HeadTable.load(path)
    path.write_text("modes: {}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"format 'dit_accel\.head_table/1', got None"):
        HeadTable.load(path)
    with pytest.raises(ConfigError, match=r"expected a \.yaml"):
        HeadTable.make(TABLE).save(tmp_path / "table.bin")
    (tmp_path / "table.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match="cannot be read"):
        HeadTable.load(tmp_path / "table.safetensors")


def test_a_model_of_another_size_is_refused():
    with pytest.raises(ConfigError, match="the table is for 4 heads, the model has 3"):
        HeadTable.make(TABLE).check_size(2, 3)
    with pytest.raises(ConfigError, match="the table is for 1 layers, the model has 2"):
        run(table=TABLE | {"heads": TABLE["heads"][:1]})


def test_slices_and_views():
    table = HeadTable.make(TABLE)
    part = table.slice(slice(1, 2), slice(0, 2))
    assert part.heads == (("near", "near"),)
    assert set(part.modes) == {"near"}
    assert table.shares()["near"] == 0.5
    lines = table.render().splitlines()
    assert lines[0].split() == ["0", "1203"]
    assert any("sliding_tile" in line and "50.0%" in line for line in lines)


STEPS = TABLE | {"later": [{"step": 3, "heads": [["near"] * 4, ["full"] * 4]}, {"step": 5, "heads": [["own"] * 4] * 2}]}


def test_rows_for_later_steps_replace_those_before():
    layers = [nn.Identity() for _ in TABLE["heads"]]
    method = get_method("composed", tile=[1, 2, 2], density=0.25, remainder="drop")
    engine = Engine(method, Schedule.make(head_table=STEPS), layers, break_even=1.0)
    made = {}
    for step in (0, 2, 3, 4, 5, 9):
        engine.begin(RunState(GRID, step, 1 - step / 10))
        made[step] = engine.attend(layers[0], *tensors(), dense=lambda: torch.full((1,), torch.nan))
    first, _ = run()
    assert torch.equal(made[0], first)
    assert torch.equal(made[2], first)
    near, _ = run(table=TABLE | {"heads": [["near"] * 4] * 2})
    assert torch.equal(made[3], near)
    assert torch.equal(made[4], near)
    own, _ = run(table=TABLE | {"heads": [["own"] * 4] * 2})
    assert torch.equal(made[5], own)
    assert torch.equal(made[9], own)
    assert len(engine.methods.all()) == 3


@pytest.mark.parametrize("suffix", ["yaml", "safetensors"])
def test_later_rows_survive_file_and_slice(tmp_path, suffix):
    table, path = HeadTable.make(STEPS), tmp_path / f"table.{suffix}"
    table.save(path)
    assert HeadTable.load(path) == table
    assert Schedule.make(**Schedule.make(head_table=STEPS).model_dump(exclude_unset=True)).head_table == table
    part = table.slice(slice(1, 2), slice(0, 2))
    assert part.all_rows == ((("near", "near"),), (("full", "full"),), (("own", "own"),))
    assert part.starts == (3, 5)
    assert set(part.modes) == {"near", "full", "own"}
    assert table.shares()["near"] == pytest.approx((4 + 4) / 24)
    assert [line for line in table.render().splitlines() if line.startswith("from")] == [
        f"from step {step}" for step in (0, 3, 5)
    ]


def test_a_table_file_of_rows_alone_holds_throughout(tmp_path):
    index = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    path, modes = tmp_path / "table.safetensors", '{"a": {"method": "dense"}, "b": {"method": "skip"}}'
    save_file({"heads": index}, path, metadata={"format": "dit_accel.head_table/1", "modes": modes})
    assert HeadTable.load(path).all_rows == ((("a", "b"), ("b", "a")),)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ([{"step": 0, "heads": TABLE["heads"]}], r"later\.0\.step"),
        ([{"step": 2, "heads": TABLE["heads"]}, {"step": 2, "heads": TABLE["heads"]}], "a step after 2, got 2"),
        ([{"step": 2, "heads": TABLE["heads"][:1]}], r"later\.0\.heads: expected 2 layers, got 1"),
        ([{"step": 2, "heads": [["full"] * 4, ["ful"] * 4]}], r"later\.0\.heads\.1\.0: unknown mode 'ful'; did you"),
        ([{"step": 2, "heads": [["full"] * 4, ["full"] * 3]}], r"later\.0\.heads\.1: expected 4 heads, got 3"),
    ],
)
def test_later_rows_that_do_not_fit_are_refused(later, message):
    with pytest.raises(ConfigError, match=message):
        HeadTable.make(TABLE | {"later": later})


def small_preset(table, **schedule):
    """The small model's preset with a head table for its 16 x 32 x 32 tokens, and five steps."""
    from dit_accel.presets import load_preset

    preset = load_preset("tiny-wan/radial")
    method = preset.method.model_copy(update={"name": "composed", "parameters": {"density": 0.25}})
    steps = preset.generation.model_copy(update={"num_inference_steps": 5})
    timetable = Schedule.make(head_table=HeadTable.make(table), **schedule)
    return preset.model_copy(update={"method": method, "schedule": timetable, "generation": steps})


def test_the_estimate_counts_steps():
    from dit_accel.estimate import estimate

    table = {"modes": MODES, "heads": [["full"]], "later": [{"step": 2, "heads": [["none"]]}]}
    guess = estimate(small_preset(table, dense_steps=1))
    assert (guess.density, guess.dense_share) == (pytest.approx(0.25), pytest.approx(0.2))


def test_the_estimate_counts_heads():
    from dit_accel.estimate import CPU, estimate, saving, speed_up, token_layout

    preset = small_preset({**TABLE, "heads": TABLE["heads"][:1]})
    layout = token_layout(preset.model, preset.generation)
    q = torch.randn(1, 1, layout.tokens, 8)
    near = get_method("sliding_tile", **MODES["near"]["parameters"]).plan(layout, q, q)[1].density
    guess = estimate(preset, CPU)
    assert guess.density == pytest.approx((1 + 0 + 0.5 + near) / 4)
    # A dense head among others costs what dense attention costs, not more.
    saved = (0 + saving(0.0, CPU) + saving(0.5, CPU) + saving(near, CPU)) / 4
    assert guess.gain == pytest.approx(speed_up(guess.attention_share, saved))


@pytest.mark.parametrize(
    ("mode", "message"),
    [
        ({"parameters": {"densty": 0.5}}, "densty"),
        ({"method": "xattention", "parameters": {"threshold": [0.9, 0.8, 0.7]}}, "expected 1 values, one per head"),
        ({"method": "sla", "parameters": {"projections": "nowhere.safetensors"}}, "nowhere.safetensors"),
    ],
)
def test_a_mode_that_cannot_run_is_refused_when_the_engine_is_made(mode, message):
    table = {"modes": MODES | {"wrong": mode}, "heads": [["full"] * 4, ["full", "full", "wrong", "full"]]}
    with pytest.raises(ConfigError, match=message):
        Engine(get_method("composed"), Schedule.make(head_table=table), [FourHeads(), FourHeads()])


class FourHeads(nn.Module):
    heads = 4


def test_on_a_gpu_the_density_asked_for_is_compared_with_the_break_even(monkeypatch):
    # There the density of a plan that depends on queries stays on the device.
    real = planner._density
    monkeypatch.setattr(planner, "_density", lambda p, _, static: real(p, torch.device("meta"), static))
    method = get_method("composed", tile=[1, 2, 2], density=0.6, remainder="drop")
    _, record = run(method=method, table=None, break_even=0.55)
    assert record.reason == "density 0.600 is above the break-even 0.55 of backend 'torch'"
    assert run(method=method, table=None, break_even=0.65)[1].reason is None
    # The mode of one head of four asks for 0.5: above 0.45 all of it is computed.
    sparse, dense = (float(run(method=method, break_even=limit)[1].density) for limit in (0.55, 0.45))
    assert dense > sparse + 0.05
    by_mass = get_method("composed", tile=[1, 2, 2], density=None, mass=0.99, remainder="drop")
    assert run(method=by_mass, table=None, break_even=0.1)[1].reason is None  # nobody knows before it is too late
