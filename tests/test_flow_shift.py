"""The noise schedule that a preset runs with is the one that its estimate and its publishers speak of."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from diffusers import CogVideoXDDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

from dit_accel.cli.calibrate import calibrate
from dit_accel.cli.compare import compare
from dit_accel.cli.making import PipelineHolder, Run
from dit_accel.estimate import estimate, token_grid
from dit_accel.flow_shift import noise_levels, scheduler_shift, set_flow_shift
from dit_accel.models import load_for_preset
from dit_accel.pipelines import WanAccelPipeline
from dit_accel.presets import list_presets, load_preset
from dit_accel.samples.tiny_random import tiny_pipeline

# generate.py and the configurations of Wan 2.1 and 2.2, the examples of Diffusers, the scripts that convert weights.
PUBLISHED = {
    "tiny-wan": 3.0,
    "tiny-wan-causal": 3.0,
    "wan2.1-t2v-1.3b-480p": 3.0,
    "wan2.1-t2v-14b-480p": 3.0,
    "wan2.1-t2v-14b-720p": 5.0,
    "wan2.1-i2v-14b-480p": 3.0,
    "wan2.1-i2v-14b-720p": 5.0,
    "wan2.1-flf2v-14b-720p": 16.0,
    "wan2.1-vace-1.3b-480p": 3.0,
    "wan2.1-vace-14b-480p": 3.0,
    "wan2.1-vace-14b-720p": 5.0,
    "wan2.2-t2v-a14b-480p": 12.0,
    "wan2.2-t2v-a14b-720p": 12.0,
    "wan2.2-i2v-a14b-480p": 5.0,
    "wan2.2-i2v-a14b-720p": 5.0,
    "wan2.2-ti2v-5b-720p": 5.0,
    "wan2.2-ti2v-5b-i2v-720p": 5.0,
    "hunyuan-video-t2v-540p": 7.0,
    "hunyuan-video-t2v-720p": 7.0,
    "hunyuan-video-i2v-720p": 7.0,
    "hunyuan-video-i2v-33ch-720p": 7.0,
    "hunyuan-video-1.5-t2v-480p": 5.0,
    "hunyuan-video-1.5-t2v-720p": 9.0,
    "hunyuan-video-1.5-i2v-480p": 5.0,
    "hunyuan-video-1.5-i2v-720p": 7.0,
    "flux1-schnell": 1.0,
}


def derived_shift(preset):
    """The shift that Diffusers derives from the tokens of the image, where the scheduler does that."""
    _, height, width = token_grid(preset.model, preset.generation)
    tokens, steps = height * width, preset.generation.num_inference_steps
    if preset.family == "flux":
        return math.exp(calculate_shift(tokens))
    return math.exp(compute_empirical_mu(tokens, steps)) if preset.family == "flux2" else None


@pytest.mark.parametrize("name", [name for name in list_presets() if "/" not in name])
def test_every_preset_has_the_shift_that_its_publishers_run(name):
    preset = load_preset(name)
    shift = PUBLISHED[name] if name in PUBLISHED else derived_shift(preset)
    assert preset.model.flow_shift == (None if shift is None else pytest.approx(shift, rel=1e-3))
    assert (preset.model.flow_shift is None) == preset.family.startswith("cogvideox")


@pytest.mark.parametrize(
    "name",
    [
        "wan2.1-t2v-14b-480p",
        "wan2.1-t2v-14b-720p",
        "wan2.2-t2v-a14b-720p",
        "hunyuan-video-1.5-t2v-720p",
        "flux1-schnell",
    ],
)
def test_a_preset_s_pipeline_runs_at_the_levels_of_the_estimate(name):
    preset = load_preset(name)
    scheduler = load_for_preset(preset, "tiny", "cpu").scheduler
    steps = preset.generation.num_inference_steps
    # UniPC makes its own, which end at 0.001 before the shift; FLUX and HunyuanVideo hand even ones to their scheduler.
    is_given = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
    scheduler.set_timesteps(
        **({"sigmas": np.array(noise_levels(steps, None))} if is_given else {"num_inference_steps": steps})
    )
    levels = (scheduler.timesteps / 1000).tolist()
    assert levels == pytest.approx(noise_levels(steps, preset.model.flow_shift), abs=0.015)
    assert scheduler_shift(scheduler) == preset.model.flow_shift


def test_one_model_s_sizes_run_with_a_shift_each_from_one_load():
    run = Run(load_preset("wan2.1-t2v-14b-720p/draft"), "a ball", 0, {}, "tiny", "cpu", "float32", "auto")
    holder = PipelineHolder()
    large = holder.get(run)
    assert scheduler_shift(large.scheduler) == 5.0
    small = holder.get(replace(run, preset=load_preset("wan2.1-t2v-14b-480p/draft")))
    assert small is large
    assert scheduler_shift(small.scheduler) == 3.0


def test_the_dense_steps_of_a_noise_window_are_those_of_the_run():
    shares = [estimate(load_preset(f"wan2.1-t2v-14b-{size}/draft")).dense_share for size in ("720p", "480p")]
    for size, share in zip(("720p", "480p"), shares, strict=True):
        pipe = WanAccelPipeline.from_preset(f"wan2.1-t2v-14b-{size}/draft", model="tiny", device="cpu")
        pipe.scheduler.set_timesteps(50)
        dense = int((pipe.scheduler.timesteps / 1000 >= 0.925).sum())
        assert share == pytest.approx(1 - (1 - dense / 50) * 39 / 40)
    assert shares[0] > shares[1]


def test_only_a_scheduler_with_a_fixed_shift_is_replaced():
    pipe = tiny_pipeline("wan2.1-t2v")
    for scheduler in (
        CogVideoXDDIMScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        DPMSolverMultistepScheduler(flow_shift=2.0),  # without flow levels, the setting does nothing
    ):
        pipe.scheduler = scheduler
        set_flow_shift(pipe, 5.0)
        assert pipe.scheduler is scheduler
        assert scheduler_shift(scheduler) is None
    pipe.scheduler = DPMSolverMultistepScheduler(
        flow_shift=2.0, use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=1
    )
    before = dict(pipe.scheduler.config)
    set_flow_shift(pipe, None)
    assert scheduler_shift(pipe.scheduler) == 2.0
    set_flow_shift(pipe, 5.0)
    after = dict(pipe.scheduler.config)
    assert {key: value for key, value in after.items() if before.get(key) != value} == {"flow_shift": 5.0}
    set_flow_shift(object(), 5.0)  # a pipeline without a scheduler is left as it is


def test_accelerate_leaves_the_scheduler_of_one_s_own_pipeline():
    from dit_accel import accelerate

    pipe = tiny_pipeline("wan2.1-t2v")
    scheduler = pipe.scheduler
    with accelerate(pipe, "wan2.1-t2v-14b-720p/fast") as acceleration:
        assert pipe.scheduler is scheduler
        runs = scheduler_shift(scheduler)
        told = f"the scheduler's shift is {runs:g}, the preset's 5: `dit_accel.flow_shift.set_flow_shift(pipe, 5)` sets"
        assert told in acceleration.summary()
    set_flow_shift(pipe, 5.0)
    with accelerate(pipe, "wan2.1-t2v-14b-720p/fast") as acceleration:
        assert "shift" not in acceleration.summary()
    with accelerate(pipe.transformer, "wan2.1-t2v-14b-720p/fast") as acceleration:  # it has no scheduler
        assert "shift" not in acceleration.summary()


@pytest.mark.parametrize(
    ("command", "given"),
    [(compare, {"output": "compared"}), (calibrate, {"output": "own.yaml", "density": 0.5})],
)
def test_commands_that_load_a_preset_s_model_set_its_shift(command, given, tmp_path, monkeypatch):
    pipe = tiny_pipeline("wan2.1-t2v")
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_, **__: pipe)

    def stop(*_, **__):
        raise RuntimeError("loaded")

    monkeypatch.setattr("dit_accel.compare.runner.run_all", stop)
    monkeypatch.setattr("dit_accel.calibrate.run.measure", stop)
    with pytest.raises(RuntimeError, match="loaded"):
        command(preset="wan2.1-t2v-14b-720p", prompts=["a ball"], **{**given, "output": tmp_path / given["output"]})
    assert scheduler_shift(pipe.scheduler) == 5.0
