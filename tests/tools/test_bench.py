"""Benchmarks: what they verify, count and refuse. No test asserts a speed."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace
from typing import ClassVar

import pytest
import torch

from dit_accel.acceleration import accelerate
from dit_accel.bench import timing
from dit_accel.bench.attention import measure, variants
from dit_accel.bench.options import Options
from dit_accel.bench.random_blocks import RandomBlocks
from dit_accel.bench.random_models import Blueprint, blueprint_of, make_model, step_arguments
from dit_accel.bench.shapes import Shape, find_shape, list_shapes, structured_qkv
from dit_accel.bench.step import build, measure_step
from dit_accel.bench.table import stream_csv
from dit_accel.bench.timing import Spread, fastest_dense, interleaved, ratios
from dit_accel.bench.verify import verify
from dit_accel.cli import main
from dit_accel.errors import ConfigError, DitAccelError, UnsupportedError
from dit_accel.estimate import token_grid
from dit_accel.families.published import published_models
from dit_accel.families.registry import family_of
from dit_accel.layout import TokenLayout
from dit_accel.methods import base
from dit_accel.methods.registry import get_method
from dit_accel.presets import list_presets, load_preset

CPU = Options(torch.device("cpu"), torch.float32, rounds=2)


class Clock:
    """Every reading is 1 ms after the one before."""

    now = 0.0

    def __call__(self):
        self.now += 1e-3
        return self.now


SMALL = Shape("small", TokenLayout((3, 9, 10), 7, "after"), 2, 16, "a test")


@pytest.mark.parametrize(
    ("name", "grid", "text", "heads", "dim"),
    [
        ("wan2.1-t2v-1.3b-480p", (21, 30, 52), 0, 12, 128),
        ("wan2.1-t2v-14b-720p", (21, 45, 80), 0, 40, 128),
        ("flux1-dev", (1, 64, 64), 512, 24, 128),
        ("flux1-dev-4k", (1, 256, 256), 512, 24, 128),
        ("cogvideox-5b", (13, 30, 45), 226, 48, 64),
    ],
)
def test_shapes_are_those_of_the_models(name, grid, text, heads, dim):
    shape = find_shape(name)
    assert (shape.layout.grid, shape.layout.text) == (grid, text)
    assert (shape.heads, shape.head_dim) == (heads, dim)
    assert name in list_shapes()


def test_an_unknown_shape_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'flux1-dev'"):
        find_shape("flux1-dve")


def test_inputs_are_seeded_and_smooth_over_the_video():
    layout = TokenLayout((2, 16, 16), 5, "before")
    q, k, _ = structured_qkv(layout, 2, 16, torch.device("cpu"), torch.float32, seed=3)
    assert torch.equal(q, structured_qkv(layout, 2, 16, torch.device("cpu"), torch.float32, seed=3)[0])
    assert not torch.equal(q, structured_qkv(layout, 2, 16, torch.device("cpu"), torch.float32, seed=4)[0])
    video = k[:, :, layout.video_slice()]
    near = (video[:, :, 1:] * video[:, :, :-1]).sum(-1).mean()
    far = (video[:, :, 200:] * video[:, :, :-200]).sum(-1).mean()
    assert near > 2 * far.abs()


def test_rounds_interleave_and_ratios_are_paired():
    calls = []

    def run(name, times):
        return lambda: calls.append(name) or next(times)

    runs = [run("a", iter([2.0, 8.0])), run("b", iter([1.0, 2.0]))]
    base, other = interleaved(runs, 2)
    assert calls == ["a", "b", "b", "a"]
    assert ratios(base, other) == Spread(3.0, 2.0, 4.0)


def test_a_density_sweep_makes_one_case_per_density():
    cases = variants(["composed", "sliding_tile", "random_blocks"], [0.2, 0.5])
    assert [(c.name, c.requested_density) for c in cases if c.name != "sliding_tile"] == [
        ("composed", 0.2),
        ("composed", 0.5),
        ("random_blocks", 0.2),
        ("random_blocks", 0.5),
    ]
    assert [c.name for c in variants(["random_blocks"], [])] == ["random_blocks"]


def test_a_preset_s_method_is_timed_with_the_preset_s_parameters():
    (own,) = variants(["wan2.1-t2v-1.3b-480p/balanced"], [])
    assert own == get_method("composed", order="bisect", tile=[4, 4, 4], density=0.25, remainder="pooled")
    swept = variants(["wan2.1-t2v-1.3b-480p/balanced"], [0.15, 0.4])
    assert [method.model_dump(exclude={"density"}) for method in swept] == [own.model_dump(exclude={"density"})] * 2
    assert [method.density for method in swept] == [0.15, 0.4]
    with pytest.raises(ConfigError, match="radail"):
        variants(["radail"], [])


def test_random_blocks_have_the_density_asked_for():
    layout = TokenLayout((1, 32, 32))
    q = torch.zeros(1, 3, 1024, 8)
    _, plan = RandomBlocks(density=0.25, block=64).plan(layout, q, q)
    assert plan.validate().density_per_head().flatten().tolist() == [0.25] * 3


def test_each_method_is_verified_before_it_is_timed(monkeypatch):
    """A kernel that is wrong gets a note, and no time."""
    methods = [get_method("composed", density=0.3, order="raster", block=32), get_method("radial", block=32)]
    assert 0 < verify(methods[0], SMALL, CPU) < 1e-4
    right = base.block_attention

    def wrong(q, k, v, plan, **options):
        out = right(q, k, v, plan, **options)
        return out if options["backend"] == "reference" or options.get("remainder") is None else out * 1.5

    monkeypatch.setattr(base, "block_attention", wrong)
    rows = {row.method: row for row in measure(SMALL, methods, CPU)}
    assert "wrong: the small case is off by 0.5" in rows["composed"].note
    assert rows["composed"].ratio is None
    assert rows["radial"].ratio is not None
    with pytest.raises(DitAccelError, match="wrong"):
        verify(methods[0], SMALL, CPU)


REUSING = [
    get_method("re_ttention", period=2, block=16),
    get_method("composed", remainder="history", period=3, density=0.3, block=16, order="raster"),
]


@pytest.mark.parametrize("method", REUSING, ids=lambda method: method.name)
def test_the_step_after_a_dense_one_is_verified(monkeypatch, method):
    """What is kept must give dense again on the same tensors, and the kernel be right on others."""
    assert verify(method, SMALL, CPU) < 1e-4
    complete, attend = type(method).complete, base.block_attention

    def forgetful(self, part):
        out = complete(self, part)
        return out - part.call.memory["history"].rest if part.call.step else out

    def wrong(q, k, v, plan, **options):
        out, lse = attend(q, k, v, plan, **options)
        return (out if options["backend"] == "reference" else out * 1.5), lse

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "complete", forgetful)
        with pytest.raises(DitAccelError, match="wrong"):
            verify(method, SMALL, CPU)
    monkeypatch.setattr(base, "block_attention", wrong)
    with pytest.raises(DitAccelError, match="wrong"):
        verify(method, SMALL, CPU)


def test_a_row_holds_what_was_measured():
    dynamic, static = measure(SMALL, [get_method("composed", density=0.3), get_method("radial", block=32)], CPU)
    for row in (dynamic, static):
        assert row.tokens == 277
        assert row.dense_backend == "sdpa"
        assert row.backend == "torch"
        assert 0 < row.density <= 1
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.dense_ms > 0
        assert row.attend_ms > 0
        assert row.verified_error < 1e-4
        assert row.note == ""
    assert dynamic.select_ms > 0
    assert dynamic.overhead > 0
    assert static.select_ms == 0
    assert static.select_first_ms > 0


class Renewing(RandomBlocks):
    """Its order takes 400 ms more at every fourth step, by a clock of its own."""

    name = "renewing"
    clock: ClassVar[Clock] = Clock()

    @property
    def cycle(self):
        return 4

    def order(self, q, k, v, call):
        self.clock.now += 0.4 * (call.step % 4 == 0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_costs_of_some_steps_count_for_all(monkeypatch, rounds):
    monkeypatch.setattr(timing, "clock_for", lambda device: Renewing.clock)
    (row,) = measure(SMALL, [Renewing()], replace(CPU, rounds=rounds))
    assert row.order_ms == pytest.approx(101)
    assert (row.dense_ms, row.attend_ms) == pytest.approx((1, 1))
    assert row.ratio == pytest.approx(1 / 102)


def test_dense_steps_count_in_density():
    method = get_method("re_ttention", period=3, block=16)
    q, k, v = torch.randn(3, 1, 2, SMALL.layout.tokens, 16)
    (row,) = measure(SMALL, [method], replace(CPU, rounds=1))
    assert row.density == pytest.approx(method.plan(SMALL.layout, q, k, v)[1].density + 1 / 3)


@pytest.mark.parametrize(
    ("name", "parameters", "cycle"),
    [
        ("radial", {}, 1),
        ("aurora", {}, 4),
        ("composed", {"order": "tile", "renew": 3, "remainder": "history", "period": 5}, 5),
        ("composed", {"order": "kmeans", "renew": 3, "density": 0.5}, 3),
        ("re_ttention", {}, 5),
    ],
)
def test_methods_say_after_how_many_steps_their_costs_repeat(name, parameters, cycle):
    assert get_method(name, **parameters).cycle == cycle


def test_heads_are_left_out_to_keep_the_time_limit():
    big = Shape("big", TokenLayout((100, 1000, 1000)), 2, 16, "a test")
    (row,) = measure(big, [get_method("radial")], replace(CPU, limit=1e-3))
    assert row.ratio is None
    assert "not timed: one head takes about" in row.note
    (row,) = measure(SMALL, [get_method("radial", block=32)], replace(CPU, heads=1))
    assert (row.heads, row.model_heads, row.note) == (1, 2, "1 of 2 heads")


def test_the_fastest_dense_is_dense():
    q, k, v = (torch.randn(1, 2, 50, 16) for _ in range(3))
    _, run = fastest_dense(q, k, v)
    torch.testing.assert_close(run(q, k, v), (q @ k.mT / 4).softmax(-1) @ v)


def test_a_step_runs_the_whole_transformer():
    preset = load_preset("tiny-wan")
    generation = preset.generation.model_copy(update={"height": 32, "width": 32, "num_frames": 5})
    small = preset.model_copy(update={"generation": generation})
    built = build(small, 2, torch.device("cpu"), torch.float32)
    assert built.layers == 2
    assert len(built.model.blocks) == 2
    (row,) = measure_step(small, built, [get_method("composed", density=0.3)], rounds=1)
    assert row["tokens"] == 3 * 8 * 8
    assert 0.2 < row["density"] < 0.6
    assert row["ratio"] > 0
    assert (row["dense_backend"], row["note"]) == ("sdpa", "")
    assert row["verified_error"] < 1e-3
    (always,) = measure_step(small, built, [get_method("re_ttention", period=1, block=16)], rounds=1)
    (row,) = measure_step(small, built, [get_method("re_ttention", period=2, block=16)], rounds=1)
    assert row["density"] == pytest.approx(always["density"] - 0.5)  # dense at every second step
    unknown = preset.model_copy(update={"repository": "someone/else"})
    with pytest.raises(ConfigError, match="someone/else"):
        build(unknown, 1, torch.device("cpu"), torch.float32)


ONE_OF_EACH = {model.repository: model for model in published_models()}


@pytest.mark.parametrize("repository", ONE_OF_EACH)
def test_every_published_model_runs_a_step_made_small(repository):
    names = [name for name in list_presets() if "/" not in name and load_preset(name).repository == repository]
    preset = load_preset(names[0])
    published = ONE_OF_EACH[repository]
    heads = {"num_attention_heads": 2, "ffn_dim": 16, "mlp_ratio": 1.0}
    text = {name: 12 for name in published.config if name in ("text_dim", "text_embed_dim", "joint_attention_dim")}
    small = {key: value for key, value in heads.items() if key in published.config} | text
    if published.config.get("added_kv_proj_dim"):
        small["added_kv_proj_dim"] = 2 * published.config["attention_head_dim"]
    unit = 2 * preset.model.vae_spatial * max(preset.model.patch[1:])
    frames = preset.generation.num_frames if preset.generation.num_frames == 1 else 9
    size = {"height": unit, "width": 2 * unit, "num_frames": frames}
    if published.config.get("use_learned_positional_embeddings"):
        space = preset.model.vae_spatial
        small |= {"sample_height": unit // space, "sample_width": 2 * unit // space, "sample_frames": frames}
    blueprint = Blueprint(published.class_name, {**published.config, **small})
    generation = preset.generation.model_copy(update=size)
    tiny = preset.model_copy(update={"generation": generation})
    generator = torch.Generator().manual_seed(0)
    arguments = step_arguments(blueprint, tiny, lambda *shape: torch.randn(*shape, generator=generator))
    model = make_model(blueprint, 3).eval()
    assert len(family_of(model).layers(model)) >= 3
    with torch.no_grad(), accelerate(model, method="composed", density=0.5, break_even=1.0) as acceleration:
        (out, *_) = model(**arguments)
        report = acceleration.report()
    assert out.isfinite().all()
    assert {call.reason for call in report.calls} == {None}
    assert family_of(model).read(model, arguments).grid == token_grid(tiny.model, tiny.generation)


def test_blocks_that_do_not_fit_are_left_out(monkeypatch):
    from dit_accel.bench import step

    preset = load_preset("wan2.1-t2v-14b-720p")
    monkeypatch.setattr(step, "available_bytes", lambda device: 10**9)
    with pytest.raises(UnsupportedError, match="one block"):
        build(preset, None, torch.device("cpu"), torch.float32)
    monkeypatch.setattr(step, "available_bytes", lambda device: 64 * 10**9)
    assert 10 < step._layers_that_fit(blueprint_of(preset), torch.device("cpu"), torch.float32) < 40


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dit-accel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_the_command_writes_rows_with_hardware_versions_date_and_command(monkeypatch, capsys, tmp_path):
    from dit_accel.bench import shapes

    monkeypatch.setitem(shapes.SMALL_SHAPES, "small", SMALL)
    path = tmp_path / "new" / "results.csv"
    options = ["--shapes", "small", "--methods", "composed", "--densities", "0.3", "--rounds", 1, "--csv", path]
    code, out, err = call(monkeypatch, capsys, "bench", "attention", *options)
    assert code == 0, err
    assert "small composed" in out
    (row,) = csv.DictReader(path.open())
    assert row["torch"] == torch.__version__
    assert row["device"]
    assert row["date"]
    assert row["command"] == f"dit-accel bench attention {' '.join(map(str, options))}"
    code, out, _ = call(monkeypatch, capsys, "bench", "attention", "--list-shapes")
    assert "flux1-dev-4k" in out
    assert call(monkeypatch, capsys, "bench", "attention", "--shapes", "smal")[0] == 2
    assert call(monkeypatch, capsys, "bench", "attention", *options[:-1], "/proc/none/x.csv")[0] == 2


def test_a_run_that_fails_keeps_the_earlier_result_and_its_own_rows(tmp_path, caplog):
    path, partial = tmp_path / "r.csv", tmp_path / "r.csv.partial"

    def rows(count, fails):
        yield from ({"n": n} for n in range(count))
        if fails:
            raise DitAccelError("no memory")

    assert list(stream_csv(path, rows(1, False), {"date": "monday"})) == [{"n": 0}]
    whole = "n,date\n0,monday\n"
    assert path.read_text() == whole
    assert not partial.exists()
    for count in (2, 0):
        with pytest.raises(DitAccelError):
            list(stream_csv(path, rows(count, True), {"date": "tuesday"}))
        assert path.read_text() == whole
        assert partial.read_text() == "n,date\n0,tuesday\n1,tuesday\n"  # a run without rows leaves those of another
    assert f"the rows of this run, 2, are in {partial}" in caplog.text
    partial.unlink()
    with pytest.raises(DitAccelError):
        list(stream_csv(path, rows(0, True), {}))
    assert [each.name for each in tmp_path.iterdir()] == ["r.csv"]
    list(stream_csv(path, rows(3, False), {"date": "friday"}))
    assert path.read_text().count("friday") == 3


def test_a_method_that_is_wrong_is_not_timed_in_a_step(monkeypatch):
    from dit_accel.bench import step

    preset = load_preset("tiny-wan")
    generation = preset.generation.model_copy(update={"height": 32, "width": 32, "num_frames": 5})
    small = preset.model_copy(update={"generation": generation})
    built = build(small, 1, torch.device("cpu"), torch.float32)

    def wrong(*_):
        raise DitAccelError("wrong: the small case is off by 0.5")

    monkeypatch.setattr(step, "verify", wrong)
    (row,) = measure_step(small, built, [get_method("composed", density=0.3)], rounds=1)
    assert row["ratio"] is None
    assert "wrong" in row["note"]
