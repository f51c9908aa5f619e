"""`generate-video --ulysses-degree` under torchrun: two gloo processes write the clip that one process writes."""

from __future__ import annotations

import json
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import yaml

from dit_accel.cli import generate
from dit_accel.cli.parallel import Degrees, Processes, check_single, processes_here
from dit_accel.errors import ConfigError
from dit_accel.presets import MethodSpec, load_preset
from dit_accel.schedule import Schedule

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SPARSE = {"name": "composed", "parameters": {"density": 0.3, "tile": [1, 1, 2], "remainder": "drop"}}
ENVIRONMENT = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def preset(folder, base, **generation):
    """A preset whose method is sparse at the size of a test."""
    path = folder / "preset.yaml"
    content = {
        "extends": base,
        "method": SPARSE,
        "schedule": {"dense_steps": 1, "min_tokens": 0, "dense_layers": []},
    }
    path.write_text(yaml.safe_dump({**content, "generation": generation}))
    return path


def run(*words):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(
    ("base", "options", "name"),
    [
        # 3 x 3 x 3 and 11 x 13 tokens: two processes cannot have equal shares.
        ("wan2.1-t2v-1.3b-480p/dense", ["--height", "48", "--width", "48", "--num-frames", "9"], "clip.gif"),
        ("flux1-dev/dense", ["--height", "176", "--width", "208"], "picture.png"),
    ],
)
def test_two_processes_write_what_one_writes(monkeypatch, tmp_path, base, options, name):
    words = ["--preset", preset(tmp_path, base), "--prompt", "a red ball", "--num-inference-steps", "2"]
    words += ["--device", "cpu", "--model", "tiny", "--seed", "3", *options]
    alone, shared = tmp_path / "alone" / name, tmp_path / "shared" / name
    monkeypatch.setattr(sys, "argv", [str(word) for word in ["generate-video", *words, "--output", alone]])
    with pytest.raises(SystemExit) as left:
        generate.main()
    assert not left.value.code
    two = run(*TORCHRUN, "-m", "dit_accel.cli", *words, "--ulysses-degree", "2", "--output", shared)
    assert two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("report: ") == 1
    assert sorted(path.name for path in shared.parent.iterdir()) == sorted(
        [shared.name, shared.with_suffix(".json").name]
    )
    first, second = (imageio.imread(path).astype(int) for path in (alone, shared))
    assert first.shape == second.shape
    assert first.std() > 1
    assert np.abs(first - second).mean() < 0.05
    calls, share = (json.loads(path.with_suffix(".json").read_text()) for path in (alone, shared))
    assert share["parallel"] == {"ulysses": 2, "ring": 1}
    assert "parallel" not in calls
    assert share["dense_reasons"] == calls["dense_reasons"]
    assert len(share["calls"]) == len(calls["calls"]) > sum(calls["dense_reasons"].values())


def test_the_environment_of_torchrun_says_which_process_this_is():
    assert processes_here({}) == Processes() == processes_here({"RANK": "3"})
    here = processes_here(ENVIRONMENT)
    assert (here.rank, here.local_rank, here.count, here.is_first) == (1, 1, 2, False)


@pytest.mark.parametrize(
    ("degrees", "count", "message"),
    [
        (Degrees(2), 1, "--ulysses-degree: needs 2 processes; start them with: torchrun --nproc-per-node 2"),
        (Degrees(), 2, "--ulysses-degree: torchrun started 2 processes"),
        (Degrees(3), 2, "--ulysses-degree: expected 2, .* got 3"),
        (Degrees(2, 2), 8, "--ring-degree: expected 8, .* got 4"),
    ],
)
def test_degrees_that_are_not_those_of_torchrun_are_refused(degrees, count, message):
    with pytest.raises(ConfigError, match=message):
        degrees.check(Processes(count=count))


def test_fitting_degrees_are_taken():
    Degrees().check(Processes())
    Degrees(4).check(Processes(count=4))
    Degrees(2, 2).check(Processes(count=4))
    Degrees(4).check_preset(load_preset("wan2.1-t2v-14b-720p"), 40)
    Degrees(1, 2).check_preset(load_preset("wan2.1-t2v-14b-720p/dense"), 40)
    Degrees(2, 2).check_preset(load_preset("wan2.1-t2v-14b-720p/dense"), 40)
    Degrees(1, 2).check_preset(load_preset("wan2.1-t2v-14b-720p/radial"), 40)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "wan2.1-t2v-14b-720p", "--ulysses-degree", "3"], "a divisor of the model's 40 attention heads"),
        (
            ["--preset", "wan2.1-t2v-14b-720p", "--ring-degree", "2"],
            "--ring-degree: method 'composed': it chooses key blocks by what all queries hold",
        ),
        (["--ulysses-degree", "0"], "--ulysses-degree"),
    ],
)
def test_what_cannot_be_divided_is_refused_before_a_model_is_loaded(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate-video", "--dry-run", *arguments])
    with pytest.raises(SystemExit) as left:
        generate.main()
    assert left.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_ring_and_ulysses_together_are_for_dense_attention():
    with pytest.raises(ConfigError, match="--ring-degree: method 'radial': ring and Ulysses together"):
        Degrees(2, 2).check_preset(load_preset("wan2.1-t2v-14b-720p/radial"), 40)


def test_representatives_that_would_stand_for_heads_of_two_processes_are_refused():
    preset = load_preset("wan2.1-t2v-1.3b-480p")
    Degrees(2).check_preset(_with_groups(preset, 4), 12)
    with pytest.raises(ConfigError, match=r"schedule\.head_groups: .* holds 3 heads; got groups of 4"):
        Degrees(4).check_preset(_with_groups(preset, 3), 12)


@pytest.mark.parametrize(
    ("method", "degrees", "second", "message"),
    [
        ("composed", Degrees(4), {"head_groups": 5}, r"schedule\.head_groups: .* holds 10 heads; got groups of 8"),
        ("clear", Degrees(1, 2), {"max_error": 0.1}, "--ring-degree: max_error"),
        (
            "clear",
            Degrees(1, 2),
            {"overrides": [{"layers": 1, "parameters": {"remainder": "pooled"}}]},
            "--ring-degree: method 'clear'",
        ),
    ],
)
def test_the_second_expert_must_divide_too(method, degrees, second, message):
    radial = load_preset("wan2.2-t2v-a14b-720p/radial")
    preset = radial.model_copy(update={"method": MethodSpec(name=method)})
    degrees.check_preset(preset, 40)
    for name in ("schedule", "schedule_2"):
        with pytest.raises(ConfigError, match=message):
            degrees.check_preset(preset.model_copy(update={name: Schedule.make(**second)}), 40)


def _with_groups(preset, groups):
    return preset.model_copy(update={"schedule": preset.schedule.model_copy(update={"head_groups": groups})})


def test_a_step_cache_that_decides_alone_is_refused():
    cached = load_preset("flux1-dev/fast")
    extras = cached.extras.model_validate({"cache": {"name": "first_block", "parameters": {}}})
    with pytest.raises(ConfigError, match=r"extras\.cache: first_block decides from the tokens of one process"):
        Degrees(2).check_preset(cached.model_copy(update={"extras": extras}), None)


def test_models_without_a_plan_and_heads_that_do_not_divide_are_refused(tmp_path):
    words = ["--prompt", "x", "--model", "tiny", "--device", "cpu", "--num-inference-steps", "1"]
    words += ["--ulysses-degree", "2", "--output", tmp_path / "x.mp4"]
    told = run(*TORCHRUN, "-m", "dit_accel.cli", "--preset", "cogvideox-2b", *words)
    assert told.returncode != 0
    assert "Diffusers has no plan to divide CogVideoXTransformer3DModel" in told.stderr
    assert "process 1: error" in told.stderr
    assert list(tmp_path.iterdir()) == []


def test_streams_and_batches_run_in_one_process():
    check_single({"--stream": True}, Processes())
    with pytest.raises(ConfigError, match="--stream: runs in one process"):
        check_single({"--prompts": False, "--stream": True}, Processes(count=2))
