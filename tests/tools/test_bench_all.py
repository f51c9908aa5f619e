"""`bench all`: one command for every table of speed, and what is in its suites."""

from __future__ import annotations

import csv
import sys

import pytest

from dit_accel.bench import shapes, suite
from dit_accel.bench.attention import variants
from dit_accel.bench.kernels import find_variants
from dit_accel.bench.random_models import blueprint_of
from dit_accel.bench.shapes import Shape, find_shape
from dit_accel.cli import main
from dit_accel.layout import TokenLayout
from dit_accel.presets import load_preset

SMALL = Shape("small", TokenLayout((3, 9, 10), 7, "after"), 2, 16, "a test")


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dit-accel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_one_command_writes_every_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(shapes.SMALL_SHAPES, "small", SMALL)
    few = suite.Sweep(("small",), ("composed", "neighborhood"), (0.3,))
    small = suite.Suite((few,), suite.Sweep(("small",), ("exact",), (0.5,)), (("nothing", 1),), rounds=1)
    monkeypatch.setattr(suite, "CPU", small)
    unknown = load_preset("tiny-wan").model_copy(update={"repository": "someone/else"})
    monkeypatch.setattr(suite, "load_preset", lambda name: unknown)
    monkeypatch.setattr(suite, "machine_name", lambda device: "here")
    code, out, err = call(monkeypatch, capsys, "bench", "all", "--output", tmp_path, "--device", "cpu")
    assert code == 0, err
    rows = {path.stem: list(csv.DictReader(path.open())) for path in tmp_path.iterdir()}
    assert sorted(rows) == ["attention-here", "kernels-here", "step-here"]
    assert [row["method"] for row in rows["attention-here"]] == ["composed", "neighborhood"]
    for row in [*rows["attention-here"], *rows["kernels-here"]]:
        assert float(row["verified_error"]) < 1e-3
        assert row["command"].startswith("dit-accel bench all")
        assert row["date"]
    assert "someone/else" in rows["step-here"][0]["note"]
    code, out, err = call(monkeypatch, capsys, "bench", "all", "--output", tmp_path, "--max-minutes", 0)
    assert code == 0, err
    assert out.count("left out: the time is up") >= 4


def test_the_suites_name_shapes_presets_and_methods_that_exist():
    for each in (suite.CPU, suite.CUDA):
        for sweep in each.attention:
            assert [find_shape(name).name for name in sweep.shapes] == list(sweep.shapes)
            assert variants(sweep.methods, sweep.densities)
        assert find_variants(each.kernels.methods)
        assert [blueprint_of(load_preset(name)) for name, _ in each.steps]
    assert suite.suite_for("cuda:1") is suite.CUDA
    assert suite.machine_name("AMD EPYC 9V74 (TM)") == "amd-epyc-9v74-tm"
