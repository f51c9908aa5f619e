"""`bench kernels`: what it computes from a measurement, and that it times nothing that is wrong."""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace

import pytest
import torch

from dit_accel.bench import kernels, shapes
from dit_accel.bench.kernels import find_pattern, find_variants, measure_kernels, pattern_plan
from dit_accel.bench.options import Options
from dit_accel.bench.shapes import Shape
from dit_accel.cli import main
from dit_accel.errors import ConfigError
from dit_accel.kernels import Backend, register_backend, registry, torch_backend
from dit_accel.layout import TokenLayout

TINY = Shape("tiny", TokenLayout((2, 9, 9), 8, "after"), 2, 16, "no model")
OPTIONS = Options(torch.device("cpu"), torch.float32, rounds=2)


def test_a_row_follows_from_its_times():
    rows = list(measure_kernels(TINY, [0.5, 1.0], list(kernels.VARIANTS), OPTIONS, (32, 16)))
    assert [row.variant for row in rows] == 2 * list(kernels.VARIANTS)
    for row in rows:
        assert row.note == ""
        assert row.backend == "torch"
        assert 0 <= row.verified_error < 1e-3
        assert row.density == pytest.approx(row.requested_density, abs=0.05)
        operations = 4 * row.heads * row.head_dim * row.tokens**2
        assert row.dense_rate == pytest.approx(operations / (row.dense_ms / 1e3) / 1e12)
        assert row.rate == pytest.approx(row.density * operations / (row.attend_ms / 1e3) / 1e12)
        assert row.ratio_low <= row.ratio <= row.ratio_high
        assert row.efficiency == pytest.approx(row.ratio * row.density)
    exact, order0 = rows[0], rows[1]
    assert exact.extra is None
    assert order0.extra == pytest.approx(order0.attend_ms / exact.attend_ms - 1)


def test_a_wrong_backend_is_not_timed(monkeypatch):
    for name in ("_BACKENDS", "_DISABLED", "_TESTED"):
        monkeypatch.setattr(registry, name, type(getattr(registry, name))(getattr(registry, name)))

    def forgets_padding(q, k, v, call):
        return torch_backend.run(q, k, v, replace(call, kv_len=None))

    wrong = Backend("wrong", forgets_padding, lambda request: None, priority=9, break_even=1.0, needs_self_test=False)
    register_backend(wrong)
    (row,) = measure_kernels(TINY, [0.5], ["exact"], replace(OPTIONS, backend="wrong"), (32, 16))
    assert row.attend_ms is None
    assert row.note.startswith("not timed: its self-test output is off by")


@pytest.mark.parametrize("pattern", ["random", "window"])
@pytest.mark.parametrize("density", [0.01, 0.4, 1.0])
def test_rows_of_a_plan_select_the_same_number_of_blocks(pattern, density):
    plan = pattern_plan(pattern, 330, (64, 32), 3, density, torch.device("cpu"), 0).validate()
    wanted = max(1, round(density * plan.k_blocks.count))
    assert (plan.counts == wanted).all()
    if pattern == "window":
        assert ((plan.indices[..., -1] - plan.indices[..., 0]) == wanted - 1).all()
        assert plan.to_mask()[0, 0, 0, 0]
        assert plan.to_mask()[0, 0, -1, -1]


def test_one_failure_loses_no_other_row(monkeypatch):
    real = kernels.block_attention

    def fails(*arguments, remainder, **options):
        if remainder is not None:
            raise MemoryError("out of memory\nsomewhere")
        return real(*arguments, remainder=remainder, **options)

    monkeypatch.setattr(kernels, "block_attention", fails)
    rows = list(measure_kernels(TINY, [0.5], ["exact", "order0", "int8"], OPTIONS, (32, 16)))
    assert [row.attend_ms is None for row in rows] == [False, True, False]
    assert rows[1].note == "failed: MemoryError: out of memory"
    monkeypatch.setattr(kernels, "fastest_dense", fails)
    assert len(list(measure_kernels(TINY, [0.5, 1.0], ["exact"], OPTIONS, (32, 16)))) == 2


def test_nothing_begins_after_the_deadline():
    rows = list(measure_kernels(TINY, [0.5, 1.0], ["exact"], replace(OPTIONS, deadline=0.0), (32, 16)))
    assert [row.note for row in rows] == 2 * ["left out: the time is up"]
    (row,) = measure_kernels(TINY, [0.5], ["exact"], replace(OPTIONS, deadline=time.monotonic() + 60), (32, 16))
    assert row.attend_ms > 0


def test_the_shapes_of_models_have_their_published_lengths():
    tokens = {name: shape.layout.tokens for name, shape in shapes.MODEL_SHAPES.items()}
    videos = {"wan-1.3b": 32_760, "wan-14b": 75_600, "hunyuan": 118_800 + 256, "cogvideox": 17_550 + 226}
    assert tokens == videos | {"flux-1k": 4_608, "flux-2k": 16_896, "flux-4k": 66_048}


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="--variants: unknown variant 'int9'; did you mean 'int8'"):
        find_variants(["int9"])
    with pytest.raises(ConfigError, match="--pattern: expected"):
        find_pattern("stripes")


def test_the_command_writes_what_it_prints(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(shapes.SMALL_SHAPES, "tiny", TINY)
    path, page = tmp_path / "rows.csv", tmp_path / "pages" / "rows.md"
    words = "bench kernels --shapes tiny --variants exact --densities 0.5 --rounds 1 --q-block 32 --k-block 16"
    words += f" --csv {path} --markdown {page} --max-minutes 5 --device cpu"
    monkeypatch.setattr(sys, "argv", ["dit-accel", *words.split()])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 0
    (row,) = csv.DictReader(path.open(encoding="utf-8"))
    assert row["variant"] == "exact"
    assert float(row["attend_ms"]) > 0
    assert row["command"].startswith("dit-accel bench kernels")
    assert "tiny exact 50% of 2 heads: torch" in capsys.readouterr().out
    stamp, _, names, _, cells = page.read_text(encoding="utf-8").splitlines()
    assert "command dit-accel bench kernels" in stamp
    assert len(names.split("|")) == len(cells.split("|"))
    assert "| tiny | 170 | 2 | exact | 50.0% | torch |" in cells
