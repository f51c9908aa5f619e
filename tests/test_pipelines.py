"""Whole pipelines on random weights: accelerated and stock, twice in a process, through the wrapper."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.errors import ConfigError
from dit_accel.pipelines import WanAccelPipeline
from dit_accel.samples.tiny_random import random_wan_pipeline

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
