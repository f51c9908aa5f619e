"""`generate-video` with several prompts and with `--seconds`; reports whose path is checked before anything runs."""

from __future__ import annotations

import json
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

from dit_accel.cli import generate
from dit_accel.cli.overrides import frames_of
from dit_accel.errors import ConfigError
from dit_accel.pipelines.ditctrl import MultiPromptCogVideoXPipeline
from dit_accel.presets import load_preset
from dit_accel.report.page import read_run, render_page

SEVERAL = ["--preset", "cogvideox-2b", "--model", "tiny", "--device", "cpu", "--num-inference-steps", "2"]
AB = ["--prompt", "a red ball", "--prompt", "a blue square"]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate-video", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            generate.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run


def test_several_prompts_make_one_video_of_the_wanted_length(command, tmp_path, monkeypatch):
    asked, make = [], MultiPromptCogVideoXPipeline.generate

    def watched(self, prompts, *args, **kwargs):
        asked.append((prompts, kwargs))
        return make(self, prompts, *args, **kwargs)

    monkeypatch.setattr(MultiPromptCogVideoXPipeline, "generate", watched)
    code, out, err = command(*SEVERAL, *AB, "--seconds", "3", "--output", "o.gif", "--seed", "4")
    assert code == 0, err
    assert "video: o.gif" in out
    ((prompts, kwargs),) = asked
    assert prompts == ["a red ball", "a red ball", "a blue square"]
    assert (kwargs["tile"], kwargs["overlap"]) == (3, 2)
    video = imageio.imread(tmp_path / "o.gif")
    assert video.shape == (25, 32, 48, 3)  # 3 seconds at 8 frames a second, in groups of 4 and one
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["prompts"] == prompts
    assert report["layout"] == {"prompts": 3, "tile": 3, "overlap": 2, "transitions": 1}
    assert report["seed"] == 4
    calls = report["calls"]
    # Two layers in two steps, over the four pairs of clips.
    assert [(x["layer"], x["step"], x["branch"]) for x in calls] == [
        (layer, step, f"clips {pair}") for step in (0, 1) for pair in range(4) for layer in (0, 1)
    ]
    assert {x["reason"] for x in calls} == {"step 0 shares no keys", "step 1 shares no keys"}
    assert all(x["method"] == "shared_keys" and x["attend_ms"] > 0 for x in calls)
    assert report["settings"]["parameters"]["layers"] == [1]
    assert "density, realised" in render_page(read_run(tmp_path / "o.json"))
    command(*SEVERAL, *AB[:3], "a red ball", "--seconds", "3", "--output", "same.gif", "--seed", "4")
    assert not np.array_equal(imageio.imread(tmp_path / "same.gif"), video)


def test_extras_of_a_preset_are_switched_on_for_several_prompts_too(command, tmp_path):
    """Weights that offload left in main memory would otherwise stay there, and the video be made on the CPU."""
    if torch.accelerator.is_available():
        pytest.skip("the extra that this asks for would work")
    (tmp_path / "p.yaml").write_text("extends: cogvideox-2b\nextras: {offload: {mode: model}}\n")
    code, _, err = command(*SEVERAL, *AB, "--preset", "p.yaml", "--output", "o.gif")
    assert code == 1
    assert "extras.offload: mode model moves weights" in err


def test_a_dry_run_says_the_clips(command):
    code, out, err = command("--preset", "cogvideox-2b", *AB, "--seconds", "20", "--dry-run")
    assert code == 0, err
    assert "9 clips of 13 latent frames, prompts 1, 1, 1, 2, 2 with 1 between them" in out


def test_seconds_are_frames_of_one_prompt_too(command, pipeline_folder, tmp_path):
    words = ["--prompt", "x", "--model", pipeline_folder, "--height", "32", "--width", "48", "--output", "o.gif"]
    code, _, err = command(*words, "--num-inference-steps", "1", "--seconds", "0.5", "--fps", "8")
    assert code == 0, err
    assert len(imageio.imread(tmp_path / "o.gif")) == 5  # half a second is 4 frames; the next that can be made is 5


@pytest.mark.parametrize(("seconds", "frames"), [(0.01, 5), (5.0, 41), (6.125, 49), (6.2, 53)])
def test_frames_cover_the_time_and_fit_the_autoencoder(seconds, frames):
    assert frames_of(seconds, None, load_preset("cogvideox-2b"), None) == frames


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (AB, "--prompt: several prompts without a causal model need CogVideoX 1.0"),
        (["--preset", "cogvideox1.5-5b", *AB], "--prompt: several prompts without"),
        ([*SEVERAL, *AB, "--density", "0.3"], "--density: several prompts run dense attention"),
        ([*SEVERAL, *AB, "--backend", "torch"], "--backend: several prompts run dense attention"),
        ([*SEVERAL, *AB, "--prompt", ""], "--prompt: expected a text"),
        ([*SEVERAL, *AB, "--seconds", "2", "--num-frames", "9"], "--seconds: says the same as --num-frames"),
        (["--prompt", "x", "--seconds", "0"], "--seconds: expected more than 0"),
        (["--prompt", "x", "--seconds", "inf"], "--seconds: expected more than 0"),
        (["--preset", "flux1-dev", "--prompt", "x", "--seconds", "2"], "--seconds: preset flux1-dev makes an image"),
        (["--stream", *AB], "--prompt: a stream begins with one"),
        (["--prompt", "x", "--report", "."], "--report: . is a directory"),
        (["--prompt", "x", "--report", "file/r.json"], "--report: cannot make file"),
    ],
)
def test_wrong_requests_are_refused_by_name(command, tmp_path, arguments, message):
    (tmp_path / "file").write_text("")
    code, _, err = command(*arguments, "--output", "made.mp4")
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "made.mp4").exists()


def test_a_step_cache_is_refused_for_several_prompts():
    from dit_accel.cli.several import check_several

    preset = load_preset("cogvideox-2b")
    extras = preset.extras.model_validate({"cache": {"name": "pab", "parameters": {}}})
    check_several(preset, {})
    with pytest.raises(ConfigError, match=r"extras\.cache: several prompts"):
        check_several(preset.model_copy(update={"extras": extras}), {})
