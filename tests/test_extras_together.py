"""Compilation around sparse attention, and extras beside each other."""

from __future__ import annotations

import pytest
import torch
from extras_cases import CACHES, COG, IMAGE, OFFLOADS, SPARSE, WAN, cached, generate, offload_to_the_cpu, with_extras
from preset_cases import pipeline_of

from dit_accel.acceleration import accelerate
from dit_accel.errors import UnsupportedError
from dit_accel.extras.settings import Extras
from dit_accel.samples.tiny_random import tiny_pipeline


@pytest.mark.parametrize(("name", "scope"), [(WAN, "blocks"), (IMAGE, "model")])
def test_compiled_blocks_run_around_sparse_attention(name, scope):
    preset = with_extras(name, compile={"scope": scope, "backend": "eager"})
    pipe = tiny_pipeline(preset.tiny)
    plain = preset.model_copy(update={"extras": Extras()})
    with accelerate(pipe, plain, **SPARSE, schedule={}):
        expected = generate(pipe, preset, num_inference_steps=2)
    torch.compiler.reset()
    with accelerate(pipe, preset, **SPARSE, schedule={}) as acceleration:
        compiled = [m for m in pipe.transformer.modules() if m._compiled_call_impl is not None]
        assert (compiled == [pipe.transformer]) == (scope == "model")
        torch.testing.assert_close(generate(pipe, preset, num_inference_steps=2), expected, atol=1e-4, rtol=1e-4)
        assert any(call.reason is None for call in acceleration.report().calls)
    assert all(m._compiled_call_impl is None for m in pipe.transformer.modules())
    torch.compiler.reset()


def test_blocks_that_diffusers_does_not_name_are_compiled_as_a_whole_model():
    preset = with_extras(COG, compile={"backend": "eager"})
    with pytest.raises(UnsupportedError, match=r"extras\.compile: scope blocks on transformer.*use scope model"):
        accelerate(tiny_pipeline(preset.tiny), preset)


COMPILE = {"compile": {"backend": "eager"}}
CACHE = {"cache": {"name": "first_block", "parameters": CACHES["first_block"]}}
CAST, GROUP = {"layerwise_casting": {}}, {"offload": OFFLOADS[0]}


BESIDE = [(CACHE, GROUP), (CAST, GROUP), (CACHE, COMPILE), (CACHE | CAST, COMPILE | GROUP)]


@pytest.mark.parametrize(("base", "added"), BESIDE)
def test_extras_stand_beside_each_other(monkeypatch, base, added):
    """Offload and compilation change nothing that a cache and stored 8-bit weights give."""
    results = []
    for extras in (base, base | added):
        preset = with_extras(WAN, **extras)
        pipe = tiny_pipeline(preset.tiny)
        offload_to_the_cpu(monkeypatch, pipe)
        torch.compiler.reset()
        with accelerate(pipe, preset, **SPARSE, schedule={}) as acceleration:
            results.append((generate(pipe, preset, num_inference_steps=2), len(acceleration.report().calls)))
            assert any(call.reason is None for call in acceleration.report().calls)
    torch.compiler.reset()
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-4, rtol=1e-4)
    assert results[1][1] == results[0][1]


def test_extras_stand_in_summary_and_report():
    preset = cached(IMAGE, "first_block")
    with accelerate(pipeline_of(preset.tiny), preset, method="dense") as acceleration:
        assert "first_block" in acceleration.summary()
        assert acceleration.report().to_dict()["settings"]["extras"]["cache"]["name"] == "first_block"
