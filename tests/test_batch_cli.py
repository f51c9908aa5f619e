"""`generate-video --prompts`: results, manifest, resuming, bad lines, and a Ray cluster that loses a worker."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest

from dit_accel.batch import Item, Manifest, plan_batch, read_prompts
from dit_accel.cli.batching import Batch
from dit_accel.cli.cluster import gpus_per_worker
from dit_accel.cli.overrides import METHOD_OPTIONS
from dit_accel.errors import ConfigError
from dit_accel.presets import Generation, load_preset

COMMAND = [sys.executable, "-c", "from dit_accel.cli.generate import main; main()"]
SMALL = ["--model", "tiny", "--num-inference-steps", "1", "--device", "cpu"]


def prompts(folder, *lines):
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


def generate(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def manifest_of(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_a_batch_runs_reports_and_resumes(tmp_path):
    lines = [
        {"prompt": "a ball"},
        {"prompt": "b", "density": 2.0},
        {"prompt": "a star", "preset": "flux1-schnell", "seed": 5},
    ]
    file, out = prompts(tmp_path, *lines), tmp_path / "out"
    first = generate("--prompts", file, "--output-dir", out, *SMALL)
    assert first.returncode == 1, first.stderr
    assert first.stdout.splitlines()[-1] == "2 of 3 done"
    assert "line 2: method" in first.stderr
    assert (out / "00001-seed0.mp4").stat().st_size > 0
    assert (out / "00003-seed5.png").stat().st_size > 0
    assert json.loads((out / "00003-seed5.json").read_text())["preset"]["name"].startswith("flux1-schnell")
    assert [entry["status"] for entry in manifest_of(out)] == ["failed", "done", "done"]  # lines are checked first
    before = (out / "00001-seed0.mp4").stat().st_mtime_ns
    prompts(tmp_path, lines[0], {"prompt": "b"}, lines[2])
    again = generate("--prompts", file, "--output-dir", out, "--resume", *SMALL)
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "3 of 3 done"
    assert (out / "00001-seed0.mp4").stat().st_mtime_ns == before


def test_a_batch_that_is_killed_goes_on_without_losing_or_repeating_work(tmp_path):
    file, out = prompts(tmp_path, *({"prompt": "a ball", "seed": seed} for seed in range(4))), tmp_path / "out"
    arguments = ["--prompts", file, "--output-dir", out, *SMALL]
    with subprocess.Popen(
        [*COMMAND, *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as run:
        patience = time.monotonic() + 200
        while not ((out / "manifest.jsonl").exists() and manifest_of(out)):
            assert run.poll() is None
            assert time.monotonic() < patience
            time.sleep(0.01)
        run.kill()
    done = {entry["output"] for entry in manifest_of(out)}
    assert 1 <= len(done) < 4
    made = {name: (out / name).stat().st_mtime_ns for name in done}
    again = generate(*arguments, "--resume")
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines()[-1] == "4 of 4 done"
    assert {name: (out / name).stat().st_mtime_ns for name in done} == made
    assert len({entry["output"] for entry in manifest_of(out)}) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompts", "none.jsonl", "--output-dir", "out"], "--prompts: cannot read"),
        (["--prompts", "none.jsonl"], "--output-dir"),
        (["--prompts", "none.jsonl", "--output-dir", "out", "--prompt", "x"], "--prompt: does not go with --prompts"),
        (["--prompt", "x", "--resume"], "--resume: goes with --prompts"),
        (["--prompt", "x", "--ray-workers", "2"], "--ray-workers: goes with --prompts"),
        (["--prompts", "none.jsonl", "--output-dir", "out", "--ray-workers", "4"], "--ray-workers: goes with --ray"),
        (
            ["--prompts", "none.jsonl", "--output-dir", "out", "--seconds", "2", "--num-frames", "5"],
            "--seconds: says the same as --num-frames",
        ),
    ],
)
def test_options_that_do_not_go_together(tmp_path, arguments, message, monkeypatch, capsys):
    from dit_accel.cli import generate as command

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate-video", *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def batch(folder, **changes):
    given = {"options": {}, "inputs": {}, "model": None, "device": "cpu", "dtype": "auto", "backend": "auto"}
    return Batch(folder / "prompts.jsonl", folder, False, **{"preset": "tiny-wan", **given, **changes})


def test_what_changes_the_result_changes_the_key_of_a_line(tmp_path):
    picture = tmp_path / "red.png"
    picture.write_bytes(b"red")
    item, i2v = Item(1, "a ball"), "wan2.1-i2v-14b-480p"
    with_image = batch(tmp_path, preset=i2v, inputs={"image": picture})
    batches = [
        batch(tmp_path),
        batch(tmp_path, model="tiny"),
        batch(tmp_path, preset="tiny-wan/dense"),
        batch(tmp_path, options={"density": 0.5}),
        batch(tmp_path, dtype="bfloat16"),
        with_image,
    ]
    keys = [each.plan(item)[1] for each in batches]
    picture.write_bytes(b"green")
    keys.append(with_image.plan(item)[1])
    assert len(set(keys)) == len(keys)
    assert batch(tmp_path, model="samples/tiny-wan", device="cuda", backend="torch").plan(item)[1] == keys[0]
    picture.unlink()
    with pytest.raises(ConfigError, match="--image: cannot read"):
        with_image.plan(item)


def test_a_file_that_a_method_reads_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights, plan = tmp_path / "w.safetensors", tmp_path / "plan.safetensors"
    method = "method: {name: sla, parameters: {projections: w.safetensors}}"
    schedule = "schedule: {overrides: [{layers: 1, parameters: {projections: plan.safetensors}}]}"
    (tmp_path / "mine.yaml").write_text(f"extends: tiny-wan\n{method}\n{schedule}\n")
    keys = []
    for texts in ((b"a", b"b"), (b"A", b"b"), (b"a", b"B")):
        for path, text in zip((weights, plan), texts, strict=True):
            path.write_bytes(text)
        keys.append(batch(tmp_path, preset="mine.yaml").plan(Item(1, "a ball"))[1])
    assert len(set(keys)) == 3


def test_another_version_of_the_library_makes_another_key(tmp_path, monkeypatch):
    before = batch(tmp_path).plan(Item(1, "a ball"))[1]
    assert batch(tmp_path).plan(Item(1, "a ball"))[1] == before
    monkeypatch.setattr("dit_accel.cli.making.metadata.version", lambda _: "0.0.0")
    assert batch(tmp_path).plan(Item(1, "a ball"))[1] != before


KEYS = ("seed", "preset", "image", *Generation.model_fields, *METHOD_OPTIONS)


@pytest.mark.parametrize("wrong", ["x", "", [1], {"a": 1}, True, -1, 1e999, 10**40])
def test_no_value_of_a_line_stops_the_others(tmp_path, wrong):
    common = {"prompt": "a", "preset": "flux1-dev", "negative_prompt": "a"}
    pairs = [{key: wrong} for key in KEYS] + [{"true_cfg_scale": 2.0, key: wrong} for key in KEYS]
    lines = [{**common, **pair} for pair in pairs] + [{"prompt": "a", key: wrong} for key in KEYS]
    file, told = prompts(tmp_path, *lines, {"prompt": "a"}), []
    items = read_prompts(file, (*Generation.model_fields, *METHOD_OPTIONS))
    for seconds in (None, 2.0):
        jobs = plan_batch(items, Manifest(tmp_path / "out", True), batch(tmp_path, seconds=seconds).plan, told.append)
        assert jobs[-1].item.number == len(lines) + 1
    assert len(told) >= len(lines)


def test_seconds_are_those_of_the_preset_of_each_line(tmp_path):
    both = batch(tmp_path, seconds=2.0)
    lines = [Item(1, "a"), Item(2, "b", preset="wan2.1-t2v-1.3b-480p"), Item(3, "c", overrides={"fps": 20})]
    frames = [both.run_of(line).preset.generation.num_frames for line in lines]
    fps = [load_preset("tiny-wan").generation.fps, load_preset("wan2.1-t2v-1.3b-480p").generation.fps, 20]
    assert fps[0] != fps[1]
    assert all(2 * rate <= made < 2 * rate + 4 for made, rate in zip(frames, fps, strict=True))
    assert both.run_of(Item(1, "a", overrides={"num_frames": 9})).preset.generation.num_frames == 9
    with pytest.raises(ConfigError, match="makes an image"):
        both.run_of(Item(1, "a", preset="flux1-schnell"))


def test_workers_ask_ray_for_a_gpu_where_there_are_some():
    """Ray hides GPUs from a worker that asks for none, and lets one that asks for too many wait for ever."""
    assert [gpus_per_worker(device, 2, 2) for device in ("auto", "cuda", "cpu")] == [1, 1, 0]
    assert gpus_per_worker("auto", 0, 2) == 0
    for device, available, message in (
        ("cuda:1", 2, "cuda, not cuda:1"),
        ("auto", 1, "at most 1"),
        ("cuda", 0, "at most 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            gpus_per_worker(device, available, 2)


def test_a_ray_cluster_finishes_although_a_worker_is_killed(tmp_path):
    pytest.importorskip("ray")
    psutil = pytest.importorskip("psutil")
    from dit_accel.cli.cluster import run_on_ray

    file = prompts(tmp_path, *({"prompt": "a ball", "seed": seed} for seed in range(5)))
    out, told = tmp_path / "out", []
    options = {"num_inference_steps": 1}
    batch = Batch(file, out, False, "tiny-wan", options, {}, "tiny", "cpu", "float32", "auto")

    def workers():
        return [p for p in psutil.process_iter(["cmdline"]) if "_Worker" in " ".join(p.info["cmdline"] or [])]

    def tell(line):
        told.append(line)
        if len(told) == 1:
            until = time.monotonic() + 120
            while len(workers()) < 2:  # the first line may be done before the second worker has come
                assert time.monotonic() < until
                time.sleep(0.1)
            workers()[0].kill()

    manifest = Manifest(out, False)
    jobs = plan_batch(read_prompts(file, tuple(Generation.model_fields)), manifest, batch.plan, tell)
    assert run_on_ray(jobs, manifest, batch, tell, "local", 2) == 5
    assert sorted(path.name for path in out.glob("*.mp4")) == [f"0000{n + 1}-seed{n}.mp4" for n in range(5)]
    assert {entry["status"] for entry in manifest_of(out)} == {"done"}
