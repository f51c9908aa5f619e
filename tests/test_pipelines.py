"""Whole pipelines on random weights: accelerated and stock, twice in a process, through the wrapper."""

from __future__ import annotations

from functools import wraps
from inspect import signature

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, WanPipeline

import dit_accel
from dit_accel import pipelines
from dit_accel.errors import ConfigError
from dit_accel.families.processor import AccelProcessor
from dit_accel.models import call_arguments, call_parameters, set_guider
from dit_accel.pipelines import WanAccelPipeline
from dit_accel.samples.tiny_random import random_wan_pipeline, tiny_arguments, tiny_pipeline

SIZE = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 3, "output_type": "latent"}


def generate(pipe, guidance=4.0, seed=0, **more):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    return pipe(prompt="a red ball", guidance_scale=guidance, generator=generator, **(SIZE | more)).frames


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_dense_equals_stock_bit_for_bit(guidance):
    pipe = random_wan_pipeline()
    stock = generate(pipe, guidance)
    with dit_accel.accelerate(pipe, method="dense") as acc:
        assert torch.equal(generate(pipe, guidance), stock)
        assert len(acc.report().calls) == 3 * 2 * (2 if guidance > 1 else 1)
    assert torch.equal(generate(pipe, guidance), stock)


@pytest.mark.parametrize("wrong", [{"method": "radail"}, {"densty": 0.3}, {"dense_steps": "two"}, {"backend": "x"}])
def test_wrong_overrides_are_refused_before_a_model_is_loaded(wrong, monkeypatch):
    monkeypatch.setattr("dit_accel.pipelines.base.load_for_preset", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=r"radial|density|dense_steps|unknown backend"):
        WanAccelPipeline.from_preset("tiny-wan/radial", **wrong)


def test_the_tiny_model_runs_at_its_own_size():
    pipe = WanAccelPipeline.from_preset("wan2.1-t2v-14b-720p", model="tiny")
    made = pipe.preset.generation
    assert (made.height, made.width, made.num_frames) == (32, 48, 5)
    assert dit_accel.load_preset("wan2.1-t2v-14b-720p").generation.height == 720


def test_two_runs_in_one_process_equal_two_processes():
    settings = {"method": "radial", "variant": "paper", "block": 16, "sink": False, "break_even": 1.0, "refresh": 2}
    pipe = random_wan_pipeline()
    dit_accel.accelerate(pipe, **settings)
    first, other, second = generate(pipe), generate(pipe, seed=1), generate(pipe)
    fresh = random_wan_pipeline()
    dit_accel.accelerate(fresh, **settings)
    assert torch.equal(first, second)
    assert torch.equal(first, generate(fresh))
    assert not torch.equal(first, other)


def test_steps_and_branches_of_a_real_pipeline_are_reported():
    pipe = random_wan_pipeline()
    acc = dit_accel.accelerate(
        pipe, method="radial", variant="paper", block=16, sink=False, break_even=1.0, dense_steps=1
    )
    generate(pipe)
    calls = acc.report().calls
    assert sorted({(c.step, c.branch) for c in calls}) == [(s, b) for s in range(3) for b in ("cond", "uncond")]
    assert all((c.reason is not None) == (c.step == 0) for c in calls)
    assert "dense x 4: each" in acc.summary()


def test_two_experts_are_both_accelerated():
    pipe = random_wan_pipeline()
    parts = {**pipe.components, "transformer_2": random_wan_pipeline(1).transformer}
    both = WanPipeline(**parts, boundary_ratio=0.9)
    stock = generate(both)
    acc = dit_accel.accelerate(both, method="dense")
    assert torch.equal(generate(both), stock)
    assert {c.component for c in acc.report().calls} == {"transformer", "transformer_2"}
    acc.remove()


def test_the_wrapper_takes_the_presets_values(pipeline_folder, tmp_path):
    preset = tmp_path / "small.yaml"
    preset.write_text(
        "extends: tiny-wan/radial\ngeneration: {height: 32, width: 48, num_frames: 9, num_inference_steps: 2}\n"
        "model: {layers: 2, heads: 2, head_dim: 16}\nmethod: {parameters: {block: 16}}"
    )
    pipe = WanAccelPipeline.from_preset(preset, model=str(pipeline_folder), device="cpu", dense_steps=1)
    pipe.set_progress_bar_config(disable=True)
    frames = pipe(prompt="a red ball", output_type="np").frames
    assert frames.shape == (1, 9, 32, 48, 3)
    assert {c.step for c in pipe.acceleration.report().calls} == {0, 1}
    assert pipe(prompt="a red ball", num_frames=5, output_type="np").frames.shape[1] == 5
    pipe.save_pretrained(tmp_path / "saved")
    assert type(WanPipeline.from_pretrained(tmp_path / "saved")) is WanPipeline


def test_the_wrapper_refuses_a_preset_of_another_task():
    with pytest.raises(ConfigError, match="is for WanImageToVideoPipeline; WanAccelPipeline is WanPipeline"):
        WanAccelPipeline.from_preset("wan2.1-i2v-14b-480p")


def test_a_preset_of_another_family_is_refused():
    preset = dit_accel.load_preset("tiny-wan").model_copy(update={"family": "flux"})
    with pytest.raises(ConfigError, match="is for family 'flux'"):
        dit_accel.accelerate(random_wan_pipeline(), preset)


WRAPPERS = [
    ("WanAccelPipeline", "wan2.2-t2v-a14b-720p"),
    ("WanAccelImageToVideoPipeline", "wan2.1-flf2v-14b-720p"),
    ("WanAccelVACEPipeline", "wan2.1-vace-1.3b-480p"),
    ("HunyuanVideoAccelPipeline", "hunyuan-video-t2v-720p"),
    ("HunyuanVideoAccelImageToVideoPipeline", "hunyuan-video-i2v-720p"),
    ("HunyuanVideo15AccelPipeline", "hunyuan-video-1.5-t2v-480p"),
    ("HunyuanVideo15AccelImageToVideoPipeline", "hunyuan-video-1.5-i2v-480p"),
    ("FluxAccelPipeline", "flux1-schnell"),
    ("FluxAccelKontextPipeline", "flux1-kontext-dev"),
    ("FluxAccelFillPipeline", "flux1-fill-dev"),
    ("Flux2AccelPipeline", "flux2-dev"),
    ("Flux2AccelKleinPipeline", "flux2-klein-4b"),
    ("CogVideoXAccelPipeline", "cogvideox-5b"),
    ("CogVideoXAccelImageToVideoPipeline", "cogvideox1.5-5b-i2v"),
]


def test_every_wrapper_is_listed_and_every_model_has_one():
    # The streaming pipeline has tests of its own, in tests/streaming.
    listed = sorted({*(name for name, _ in WRAPPERS), "StreamingWanPipeline"})
    assert listed == sorted(pipelines.__all__) == sorted(pipelines._WRAPPERS)
    stock = {getattr(pipelines, name).stock_class().__name__ for name in pipelines.__all__}
    assert {dit_accel.load_preset(name).pipeline for name in dit_accel.list_presets() if "/" not in name} == stock
    with pytest.raises(AttributeError, match="no attribute 'NoPipeline'"):
        pipelines.NoPipeline  # noqa: B018


@pytest.mark.parametrize(("wrapper", "name"), WRAPPERS)
def test_every_wrapper_behaves_like_its_pipeline(wrapper, name):
    cls = getattr(pipelines, wrapper)
    pipe = cls.from_preset(f"{name}/dense", model="tiny", device="cpu")
    preset = pipe.preset
    assert isinstance(pipe, cls.stock_class())
    stock = tiny_pipeline(preset.tiny)
    stock.scheduler = type(stock.scheduler).from_config(pipe.scheduler.config)  # whose shift is the preset's
    call = tiny_arguments(preset.tiny)
    guidance = {k: v for k, v in call_arguments(stock, preset.generation).items() if k not in call}
    expected = np.asarray(stock(**call, **guidance)[0])
    call["generator"].manual_seed(0)
    seen = []
    if "callback_on_step_end" in call_parameters(cls):
        call["callback_on_step_end"] = lambda _pipe, step, _timestep, values: seen.append(step) or values
    np.testing.assert_allclose(np.asarray(pipe(**call)[0]), expected, atol=1e-5)
    assert seen in ([0, 1], [])
    assert {record.step for record in pipe.acceleration.report().calls} == {0, 1}
    assert signature(cls.__call__) == signature(cls.stock_class().__call__)


@pytest.mark.parametrize(("wrapper", "name"), WRAPPERS)
def test_every_wrapper_moves_and_saves_like_its_pipeline(wrapper, name, tmp_path):
    cls = getattr(pipelines, wrapper)
    pipe = cls.from_preset(f"{name}/fast", model="tiny", device="cpu")
    weights = {key: value.clone() for key, value in pipe.transformer.state_dict().items()}
    pipe.save_pretrained(tmp_path)
    again = cls.stock_class().from_pretrained(tmp_path)
    assert type(again) is cls.stock_class()
    assert all(torch.equal(value, weights[key]) for key, value in again.transformer.state_dict().items())
    assert again.transformer.state_dict().keys() == weights.keys()
    own = {key: value for key, value in pipe.config.items() if isinstance(value, bool | float)}
    assert own == {key: again.config[key] for key in own}
    assert pipe.to(torch.float64) is pipe
    assert pipe.transformer.dtype == pipe.vae.dtype == torch.float64
    pipe.acceleration.remove()
    assert not [p for p in pipe.transformer.attn_processors.values() if isinstance(p, AccelProcessor)]


def test_defaults_of_the_preset_give_way_to_what_a_call_says(monkeypatch):
    pipe = pipelines.FluxAccelPipeline.from_preset("flux1-dev/fast", model="tiny", device="cpu", density=0.5)
    assert pipe.acceleration.settings["parameters"]["density"] == 0.5
    seen = {}

    @wraps(FluxPipeline.__call__)
    def call(self, *args, **kwargs):
        seen.update(args=args, **kwargs)

    monkeypatch.setattr(FluxPipeline, "__call__", call)
    pipe("a prompt", height=64)
    assert seen == {
        "args": ("a prompt",),
        "height": 64,
        "width": 48,  # of the tiny model
        "num_inference_steps": 28,
        "guidance_scale": 3.5,
        "max_sequence_length": 512,
    }


def test_the_guider_of_hunyuan_video_1_5_takes_the_guidance():
    pipe = tiny_pipeline("hunyuan-video-1.5")
    generation = dit_accel.load_preset("hunyuan-video-1.5-t2v-480p").generation
    assert "guidance_scale" not in call_arguments(pipe, generation)
    set_guider(pipe, generation.model_copy(update={"guidance_scale": 2.5}))
    assert pipe.guider.guidance_scale == 2.5


def test_a_guider_of_one_s_own_stays(monkeypatch):
    name = "hunyuan-video-1.5-t2v-480p/fast"
    pipe = pipelines.HunyuanVideo15AccelPipeline.from_preset(name, model="tiny", device="cpu")
    assert pipe.guider.guidance_scale == pipe.preset.generation.guidance_scale
    pipe.guider = pipe.guider.new(guidance_scale=1.25)
    monkeypatch.setattr(pipe.stock_class(), "__call__", wraps(pipe.stock_class().__call__)(lambda self, **kwargs: None))
    pipe(prompt="x")
    assert pipe.guider.guidance_scale == 1.25


def test_kontext_makes_the_size_that_a_call_says():
    pipe = pipelines.FluxAccelKontextPipeline.from_preset("flux1-kontext-dev/fast", model="tiny", device="cpu")
    arguments = {**tiny_arguments(pipe.preset.tiny, steps=1), "height": 48, "width": 32}
    assert pipe(**arguments).images[0].shape[:2] == (48, 32)


def two_experts(name, **settings):
    """(component, step) of the sparse calls and of all calls of four steps on the tiny pipeline of a Wan 2.2 preset."""
    pipe, preset = tiny_pipeline(dit_accel.load_preset(name).tiny), dit_accel.load_preset(name)
    acceleration = dit_accel.accelerate(
        pipe, method="composed", order="tile", tile=[1, 2, 2], density=0.4, break_even=1.0, **settings
    )
    pipe(**tiny_arguments(preset.tiny, steps=4))
    calls = acceleration.report().calls
    sparse = {(call.component, call.step) for call in calls if call.reason is None}
    return sparse, {(call.component, call.step) for call in calls}


@pytest.mark.parametrize("name", ["wan2.2-t2v-a14b-720p", "wan2.2-i2v-a14b-720p"])
def test_steps_of_both_experts_are_those_of_the_run(name):
    sparse, calls = two_experts(name, schedule={"dense_steps": 1}, schedule_2={"dense_steps": [[3, 4]]})
    assert sorted(step for _, step in calls) == [0, 1, 2, 3]
    assert {component for component, _ in calls} == {"transformer", "transformer_2"}
    first = {(c, s) for c, s in calls if c == "transformer" and s > 0}
    second = {(c, s) for c, s in calls if c == "transformer_2" and s != 3}
    assert second
    assert sparse == first | second


def test_noise_windows_serve_one_expert_and_keywords_both():
    everywhere, calls = two_experts("wan2.2-t2v-a14b-720p", schedule_2={"dense_noise": [[0.0, 1.0]]})
    assert everywhere == {(c, s) for c, s in calls if c == "transformer"}
    nowhere, _ = two_experts("wan2.2-t2v-a14b-720p", schedule_2={"min_tokens": 1}, dense_steps=4)
    assert nowhere == set()


def test_a_second_schedule_without_a_second_expert_is_refused():
    with pytest.raises(ConfigError, match="this pipeline has no transformer_2"):
        dit_accel.accelerate(random_wan_pipeline(), method="radial", schedule_2={"dense_steps": 1})
    preset = dit_accel.load_preset("wan2.2-t2v-a14b-720p/rectified")
    assert preset.schedule_2.dense_noise == ((0.86, 0.875),)
    acceleration = dit_accel.accelerate(tiny_pipeline(preset.tiny), preset)
    assert acceleration.engines["transformer_2"].schedule == preset.schedule_2
    assert "schedule of transformer_2" in acceleration.summary()
    replaced = dit_accel.accelerate(tiny_pipeline(preset.tiny), preset, schedule={})
    assert replaced.engines["transformer_2"].schedule == replaced.engines["transformer"].schedule
