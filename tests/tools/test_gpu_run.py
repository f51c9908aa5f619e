"""The run on a GPU, rehearsed: what it checks and times, and that a task which fails costs itself alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dit_accel.bench import gpu_checks, gpu_run
from dit_accel.bench.gpu_checks import CheckRow, check_tasks, name_of, run_check
from dit_accel.bench.gpu_run import Worker, run_stage, unmeasured
from dit_accel.bench.gpu_summary import Record
from dit_accel.bench.gpu_timings import SpeedRow, Stopwatch, speed_tasks
from dit_accel.bench.kernels import VARIANTS
from dit_accel.bench.options import TIME_IS_UP, Options
from dit_accel.kernels import Backend, torch_backend
from dit_accel.kernels.aot_cases import AttentionCase, from_json, shipped
from dit_accel.kernels.triton_configs import TILES

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# A process that answers like one of ours, but dies, hangs, or gives a row and dies, on demand.
CHILD = """
import json, os, sys, time
for line in sys.stdin:
    task = json.loads(line)
    if task["do"] == "die": sys.exit("a planned end")
    if task["do"] == "hang": time.sleep(60)
    print(json.dumps({"status": "passed", "note": task["do"], "pid": os.getpid()}), flush=True)
    if task["do"] == "half": os._exit(3)
    print("null", flush=True)
"""
# The packages that a machine may lack.
BARE = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("diffusers", "transformers", "pydantic", "yaml", "safetensors", "typer", "rich"):
            raise ModuleNotFoundError("not there: " + name, name=name)
sys.meta_path.insert(0, Missing())
import runpy
sys.argv = ["run_on_gpu.py", *sys.argv[1:]]
runpy.run_path("samples/run_on_gpu.py", run_name="__main__")
"""
pytest.importorskip("triton", reason="Triton has wheels for Linux only")


def stage(names, deadline=60.0, workers=1):
    rows = []
    made = [Worker([sys.executable, "-c", CHILD], {}) for _ in range(workers)]
    tasks = [{"kind": "operation", "name": name, "do": name} for name in names]
    run_stage(tasks, made, time.monotonic() + deadline, name_of, rows.append)
    return rows


def test_a_task_that_takes_its_process_down_loses_no_other(monkeypatch):
    monkeypatch.setattr(gpu_run, "_LONGEST_TASK", 8.0)
    rows = stage(["a", "die", "b", "half", "hang", "c"])
    assert [row["note"] for row in rows if row["status"] == "passed"] == ["a", "b", "half", "c"]
    failed = [row["note"] for row in rows if row["status"] == "failed"]
    assert failed == [
        "it ended the process: a planned end",
        "it ended the process: exit code 3",
        "it took more than 8 s",
    ]
    # One process serves until it is lost.
    pids = {row["note"]: row["pid"] for row in rows if "pid" in row}
    assert pids["b"] == pids["half"] != pids["a"]


def test_what_the_time_does_not_suffice_for_is_left_out_and_said():
    rows = stage(["a", "hang", "b"], deadline=3.0)
    assert [row["status"] for row in rows] == ["passed", "left out", "left out"]
    assert {row["note"] for row in rows[1:]} == {TIME_IS_UP}


@pytest.mark.parametrize("arch", TILES)
def test_every_shipped_tile_every_variant_and_every_operation_is_checked(arch):
    tasks = check_tasks(arch)
    cases = [from_json(task["case"]) for task in tasks if task["kind"] == "tile"]
    assert cases == [case for case in shipped([arch]) if isinstance(case, AttentionCase)]
    assert {task["variant"] for task in tasks if task["kind"] == "call"} == set(VARIANTS)
    names = [(row.kind, row.name, row.tile) for row in map(name_of, tasks)]
    assert len(set(names)) == len(names)
    assert json.loads(json.dumps(tasks)) == json.loads(json.dumps(check_tasks(arch)))
    shapes = {task["shape"] for task in speed_tasks(arch) if "shape" in task}
    assert shapes == {"wan-1.3b", "wan-14b", "hunyuan", "cogvideox", "flux-1k", "flux-2k", "flux-4k"}


@pytest.mark.parametrize("fault", ["none", "wrong", "unsteady"])
def test_a_check_finds_what_is_wrong(monkeypatch, fault):
    calls = []

    def run(q, k, v, call):
        calls.append(call)
        out, lse = torch_backend.run(q, k, v, call)
        shift = {"none": 0.0, "wrong": 0.1, "unsteady": 1e-4 * len(calls)}[fault]
        return out + shift, lse

    monkeypatch.setattr(gpu_checks.triton_backend, "run", run)
    monkeypatch.setattr(gpu_checks.triton_backend, "BACKEND", Backend("triton", run, lambda request: None, 0, 1.0))
    for features in ("D64 ragged lengths", "D64 window ball", "D64 about the query grouped", "D64 int8 skip"):
        task = next(task for task in check_tasks(90) if task["kind"] == "tile" and features in name_of(task).name)
        row = run_check(task, CPU)
        assert row.status == ("passed" if fault == "none" else "failed")
        assert {"none": "", "wrong": "output off by", "unsteady": "two runs on"}[fault] in row.note
        if fault == "none":
            assert 0 <= row.error <= row.budget


def test_every_kind_of_timing_gives_rows():
    watch = Stopwatch(Options(CPU, torch.float32, rounds=1, heads=1))
    rows = [row for task in speed_tasks(90, tiny=True)[:4] for row in watch.run(task)]
    assert {row.kind for row in rows} == {"roof", "dense", "step", "kernel"}
    assert all(row.ms > 0 for row in rows)
    steps = [row.what for row in rows if row.kind == "step"]
    assert "scores to plan, per layer" in steps
    assert unmeasured(speed_tasks(90)[-1]).shape == "flux-1k"


def test_files_are_whole_after_every_row(tmp_path, capsys):
    record = Record(tmp_path, {"device": "none"}, 2, 1)
    record.check(vars(CheckRow("tile", "bf16 D64", "64x64 w4 s2", error=1e-3, budget=2e-3)))
    assert record.exit_code == 0
    record.speed(vars(SpeedRow("kernel", "wan", "exact (triton)", 2, 0.125, 1.0, "cudnn", 6.0, 6.0, 9.0, 0.75)))
    record.check(vars(CheckRow("tile", "bf16 D64", "x", "left out", note=TIME_IS_UP)))
    assert record.exit_code == 2
    record.check(vars(CheckRow("tile", "bf16 D128", "y", "failed", note="off")))
    assert record.exit_code == 1
    assert "FAILED tile bf16 D128 y: off" in capsys.readouterr().out
    assert [row["status"] for row in csv.DictReader((tmp_path / "checks.csv").open())] == [
        "passed",
        "left out",
        "failed",
    ]
    everything = json.loads((tmp_path / "results.json").read_text())
    assert (len(everything["checks"]), len(everything["times"])) == (3, 1)
    page = (tmp_path / "summary.md").read_text()
    assert "Checks: 1 passed, 1 failed, 1 left out, of 2." in page
    assert "aimed at at least 0.85, found 0.75 to 0.75; 0 of 1 calls meet it" in page
    assert "| kernel | wan | exact (triton) | 2 | 12.5% | 1.000 | cudnn |" in page


def test_a_clone_with_torch_and_triton_alone_runs_it(tmp_path):
    command = [
        sys.executable,
        "-P",
        "-c",
        BARE,
        "--device",
        "cpu",
        "--only",
        "operation move",
        "--output",
        str(tmp_path),
    ]
    child = subprocess.run(
        command, cwd=ROOT, env={"PATH": ""}, capture_output=True, text=True, check=False, timeout=600
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert "Checks: 1 passed, 0 failed, 0 left out, of 1." in (tmp_path / "summary.md").read_text()
