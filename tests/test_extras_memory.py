"""Offload and stored 8-bit weights under sparse attention: the same results, or a refusal."""

from __future__ import annotations

import pytest
import torch
from extras_cases import CACHES, IMAGE, OFFLOADS, SPARSE, WAN, WAN_TWO, generate, offload_to_the_cpu, with_extras
from preset_cases import pipeline_of

from dit_accel.acceleration import accelerate
from dit_accel.errors import UnsupportedError
from dit_accel.extras.settings import Extras
from dit_accel.presets import load_preset
from dit_accel.samples.tiny_random import tiny_pipeline


@pytest.mark.parametrize("name", [WAN_TWO, "hunyuan-video-t2v-720p", IMAGE])
def test_layerwise_casting_stores_eight_bits_under_sparse_attention_and_a_cache(name):
    cache = {"name": "first_block", "parameters": CACHES["first_block"]}
    preset = with_extras(name, layerwise_casting={}, cache=cache)
    pipe = tiny_pipeline(preset.tiny)
    for _ in range(2):  # the second finds the weights cast already
        acceleration = accelerate(pipe, preset, **SPARSE, schedule={})
    stored = {weight.dtype for weight in pipe.transformer.parameters()}
    assert torch.float8_e4m3fn in stored
    out = generate(pipe, preset)
    assert torch.isfinite(out).all()
    assert any(call.reason is None for call in acceleration.report().calls)
    acceleration.remove()
    assert torch.float8_e4m3fn in {weight.dtype for weight in pipe.transformer.parameters()}


@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_offload_without_an_accelerator_is_refused(mode):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator here")
    with pytest.raises(UnsupportedError, match=rf"extras\.offload: mode {mode}.*no accelerator here"):
        accelerate(pipeline_of(load_preset(WAN).tiny), with_extras(WAN, offload={"mode": mode}))


@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("name", [WAN, IMAGE])
def test_weights_that_come_when_needed_give_the_same_under_sparse_attention(monkeypatch, name, offload):
    preset = with_extras(name, offload=offload)
    pipe, plain = tiny_pipeline(preset.tiny), preset.model_copy(update={"extras": Extras()})
    stock = generate(pipe, preset)
    with accelerate(pipe, plain, **SPARSE):
        expected = generate(pipe, preset)
    offload_to_the_cpu(monkeypatch, pipe)
    with accelerate(pipe, preset, **SPARSE) as acceleration:
        away = offload["mode"] == "sequential"
        assert {weight.is_meta for weight in pipe.transformer.parameters()} == {away}
        for generation in range(2):  # Accelerate and Diffusers put their hooks on anew after each
            assert torch.equal(generate(pipe, preset), expected)
            calls = acceleration.report().calls
            assert {call.generation for call in calls} == {generation}
            assert any(call.reason is None for call in calls)
    assert torch.equal(generate(pipe, preset), stock)
