"""Extras of a preset beside sparse attention: what is switched on runs, can be undone, and is refused where wrong."""

from __future__ import annotations

import sys
from types import ModuleType

import diffusers
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import FirstBlockCacheConfig
from preset_cases import arguments, pipeline_of, shrunk

from dit_accel import extras as extras_module
from dit_accel import extras_cache
from dit_accel.acceleration import accelerate
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.extras import Extras, Quantization, quantization_config
from dit_accel.extras_cache import Guidance, enable_cache
from dit_accel.families.registry import family_of
from dit_accel.models import load_for_preset
from dit_accel.presets import list_presets, load_preset
from dit_accel.samples.tiny_random import tiny_pipeline

STEPS = 6
SPARSE = {"method": "composed", "order": "tile", "tile": [1, 2, 2], "density": 0.4, "break_even": 1.0}
# Parameters with which every cache skips something in six steps.
CACHES = {
    "first_block": {"threshold": 10.0},
    "mag": {"mag_ratios": [1.0] * STEPS, "threshold": 1.0, "retention_ratio": 0.2},
    "taylorseer": {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": "float32"},
    "pab": {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": [0, 999]},
    "faster": {
        "spatial_attention_timestep_skip_range": [-1, 999],
        "unconditional_batch_timestep_skip_range": [-1, 999],
        "unconditional_batch_skip_range": 3,
    },
    "sea": {"threshold": 10.0},
}
WAN, WAN_TWO, IMAGE, COG = "wan2.1-t2v-1.3b-480p", "wan2.2-t2v-a14b-720p", "flux1-dev", "cogvideox-5b"
# One model per pipeline class, and the caches that are right on it; all others are refused.
RUNS_ON = {
    WAN: "first_block mag taylorseer sea",
    "wan2.1-i2v-14b-480p": "first_block mag taylorseer",
    "wan2.1-vace-1.3b-480p": "taylorseer",
    WAN_TWO: "first_block taylorseer",
    "hunyuan-video-t2v-720p": "first_block mag taylorseer pab faster",
    "hunyuan-video-i2v-720p": "mag pab faster",
    "hunyuan-video-1.5-t2v-480p": "taylorseer",
    "hunyuan-video-1.5-i2v-480p": "taylorseer",
    IMAGE: "first_block mag taylorseer pab faster",
    "flux1-kontext-dev": "mag pab faster",
    "flux1-fill-dev": "mag",
    "flux2-dev": "mag pab faster",
    "flux2-klein-4b": "mag taylorseer pab faster",
    COG: "first_block mag taylorseer pab faster",
    "cogvideox1.5-5b-i2v": "first_block mag taylorseer pab faster",
}
DEEPER = {"first_block": WAN_TWO, "mag": IMAGE, "taylorseer": WAN, "pab": IMAGE, "faster": COG, "sea": WAN}
REFUSED = [
    ("pab", WAN, "two guidance branches"),
    ("faster", "hunyuan-video-1.5-t2v-480p", "two guidance branches"),
    ("sea", IMAGE, "does not say step and noise level"),
    ("first_block", "flux1-kontext-dev", "no cache_context"),
    ("taylorseer", "hunyuan-video-i2v-720p", "no cache_context"),
    ("pab", "flux1-fill-dev", "no current_timestep"),
    ("first_block", "wan2.1-vace-1.3b-480p", "count them twice"),
    ("mag", WAN_TWO, "counts the steps of one transformer"),
    ("first_block", "flux2-klein-4b", "its last block returns text and image in one"),
    ("first_block", "hunyuan-video-1.5-t2v-480p", "not registered"),
]


def with_extras(name, **extras):
    preset = shrunk(load_preset(name), STEPS)
    return preset.model_copy(update={"extras": Extras(**extras)})


def cached(name, cache):
    return with_extras(name, cache={"name": cache, "parameters": CACHES[cache]})


def generate(pipe, preset, seed=0, **more):
    generator = torch.Generator().manual_seed(seed)
    return torch.as_tensor(pipe(**arguments(pipe, preset, generator=generator, **more))[0])


def attention_calls(pipe):
    """A list that grows by the number of attention layers with every call of a transformer of `pipe`."""
    counted = []
    for name in ("transformer", "transformer_2"):
        model = getattr(pipe, name, None)
        if model is not None:
            layers = len(family_of(model).layers(model))
            model.register_forward_pre_hook(lambda *_, layers=layers: counted.append(layers))
    return counted


def test_every_pipeline_class_is_listed():
    listed = [load_preset(name).pipeline for name in RUNS_ON]
    models = {load_preset(name).pipeline for name in list_presets() if "/" not in name}
    assert sorted(listed) == sorted([*models, "WanPipeline"])  # once with one transformer, once with two


@pytest.mark.parametrize("name", RUNS_ON)
def test_each_step_cache_runs_beside_sparse_attention_or_is_refused(name):
    pipe = tiny_pipeline(load_preset(name).tiny)
    possible = attention_calls(pipe)
    for cache in CACHES:
        preset = cached(name, cache)
        if cache not in RUNS_ON[name].split():
            with pytest.raises(UnsupportedError, match=rf"extras\.cache: {cache}"):
                accelerate(pipe, preset)
            continue
        possible.clear()
        with accelerate(pipe, preset, **SPARSE, schedule={"refresh": 2}) as acceleration:
            assert torch.isfinite(generate(pipe, preset)).all()
            calls = acceleration.report().calls
        assert 0 < len(calls) < sum(possible), f"{cache} skipped nothing"
        assert any(call.reason is None for call in calls)
        assert len({call.generation for call in calls}) == 1
        assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(("cache", "name"), DEEPER.items())
def test_a_step_cache_and_sparse_attention_leave_nothing_to_the_next_generation(cache, name):
    preset, pipe = cached(name, cache), pipeline_of(load_preset(name).tiny)
    with accelerate(pipe, preset, **SPARSE, schedule={"dense_steps": 1, "refresh": 2}):
        first, other = generate(pipe, preset), generate(pipe, preset, seed=1)
        assert torch.equal(generate(pipe, preset), first)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("cache", "name"),
    [("mag", WAN), ("taylorseer", WAN), ("sea", WAN), ("first_block", IMAGE), ("pab", COG), ("faster", COG)],
)
def test_what_a_cache_keeps_fits_tokens_that_stand_in_a_shared_order(cache, name):
    preset, pipe = cached(name, cache), pipeline_of(load_preset(name).tiny)
    tiles = {"method": "sliding_tile", "tile": [1, 2, 2], "window": [1, 1, 3], "break_even": 1.0}
    results = []
    for hoist in (False, True):
        with accelerate(pipe, preset, **tiles, hoist=hoist, schedule={"dense_steps": 1}) as acceleration:
            results.append(generate(pipe, preset))
            assert acceleration.engines["transformer"].standing.is_hoisted == hoist
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["svg2", "re_ttention", "rectified"])
@pytest.mark.parametrize("cache", ["first_block", "taylorseer"])
def test_methods_that_remember_run_beside_skipped_steps(cache, method):
    preset, pipe = cached(WAN, cache), pipeline_of(load_preset(WAN).tiny)
    with accelerate(pipe, preset, method=method, density=0.4, break_even=1.0, schedule={"dense_steps": 1}) as acc:
        first = generate(pipe, preset)
        calls = [call for call in acc.report().calls if call.branch == "cond"]
        assert torch.equal(generate(pipe, preset), first)
    assert torch.isfinite(first).all()
    assert {call.reason for call in calls if call.step == 0} == {"step 0 is in dense_steps [0, 1)"}
    assert len(calls) < 2 * STEPS


def test_a_search_at_a_skipped_step_is_made_at_the_next_computed_one():
    """TaylorSeer computes steps 0, 1, 3 and 5 here, so the search of step 2 is made at step 3."""
    preset, pipe = cached(WAN, "taylorseer"), pipeline_of(load_preset(WAN).tiny)
    with accelerate(pipe, preset, **SPARSE, schedule={"search_steps": [0, 2]}) as acceleration:
        generate(pipe, preset)
        calls = [c for c in acceleration.report().calls if c.layer == 1 and c.branch == "uncond"]
    computed = [c.step for c in calls]
    made = [c.step for c in calls if c.milliseconds("select") > 0]
    assert 2 not in computed
    assert made == [0, min(step for step in computed if step > 2)]


@pytest.mark.parametrize(("cache", "name"), [("first_block", WAN), ("faster", COG), ("pab", IMAGE), ("mag", IMAGE)])
def test_a_cache_beside_dense_attention_gives_what_the_cache_alone_gives(cache, name):
    preset, pipe = cached(name, cache), pipeline_of(load_preset(name).tiny)
    undo = enable_cache(
        preset.extras.cache,
        pipe,
        {"transformer": pipe.transformer},
        Guidance(STEPS, preset.generation.guidance_scale),
    )
    alone = generate(pipe, preset)
    undo()
    with accelerate(pipe, preset, method="dense"):
        assert torch.equal(generate(pipe, preset), alone)
    assert not torch.equal(generate(pipe, preset), alone)


def test_skipped_steps_leave_plans_as_they_were_made():
    """With all blocks but the first skipped after step 1, their plans stay those of step 1, the first's are renewed."""
    preset, pipe = cached(WAN, "first_block"), pipeline_of(load_preset(WAN).tiny)
    with accelerate(pipe, preset, **SPARSE, schedule={"refresh": 2}) as acceleration:
        generate(pipe, preset)
        calls = acceleration.report().calls
    steps = {layer: [c.step for c in calls if c.layer == layer and c.branch == "cond"] for layer in (0, 1)}
    assert steps == {0: list(range(STEPS)), 1: [0]}
    made = [c.step for c in calls if c.layer == 0 and c.branch == "cond" and c.milliseconds("select") > 0]
    assert made == [0, 2, 4]


@pytest.mark.parametrize(("cache", "name", "reason"), REFUSED)
def test_caches_that_would_be_wrong_are_refused_with_the_reason(cache, name, reason):
    preset, pipe = cached(name, cache), pipeline_of(load_preset(name).tiny)
    processors = dict(pipe.transformer.attn_processors)
    with pytest.raises(UnsupportedError, match=rf"extras\.cache: {cache}.*{reason}"):
        accelerate(pipe, preset)
    assert pipe.transformer.attn_processors == processors
    assert not pipe.transformer.is_cache_enabled


@pytest.mark.parametrize(("cache", "name"), [("mag", "flux1-kontext-dev"), ("pab", IMAGE)])
def test_guidance_in_two_calls_is_refused_where_a_cache_would_mix_them(cache, name):
    preset = cached(name, cache)
    guided = preset.model_copy(update={"generation": preset.generation.model_copy(update={"true_cfg_scale": 3.0})})
    pipe = pipeline_of(preset.tiny)
    with pytest.raises(UnsupportedError, match=rf"extras\.cache: {cache}.*would mix them"):
        accelerate(pipe, guided)
    accelerate(pipe, preset).remove()


def test_a_cache_that_is_on_already_or_unknown_ratios_are_refused():
    for name in ("flux2-dev", COG):
        pipe = tiny_pipeline(load_preset(name).tiny)
        with pytest.raises(UnsupportedError, match="mag_ratios are not known for this model"):
            accelerate(pipe, with_extras(name, cache={"name": "mag"}))
    accelerate(pipeline_of(load_preset(IMAGE).tiny), with_extras(IMAGE, cache={"name": "mag"})).remove()
    with accelerate(pipe, cached(COG, "first_block")):
        accelerate(pipe, cached(COG, "mag")).remove()  # a second call replaces the first, and its cache
    pipe.transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(UnsupportedError, match="a step cache is on already"):
        accelerate(pipe, cached(COG, "mag"))
    with pytest.raises(UnsupportedError, match="bare transformer"):
        accelerate(tiny_pipeline(load_preset(COG).tiny).transformer, cached(COG, "pab"))


def test_diffusers_without_a_cache_is_named(monkeypatch):
    extras_cache._config_class.cache_clear()
    monkeypatch.setitem(extras_cache._CONFIGS, "sea", "NoSuchCacheConfig")
    with pytest.raises(ConfigError, match=rf"Diffusers {diffusers.__version__} has no NoSuchCacheConfig"):
        Extras(cache={"name": "sea"}).check()
    extras_cache._config_class.cache_clear()


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


def offload_to_the_cpu(monkeypatch, pipe):
    """Let Diffusers' and Accelerate's own offload hooks run with the CPU in the accelerator's place."""
    cpu = torch.device("cpu")
    monkeypatch.setattr("dit_accel.extras_install._accelerator", lambda: "meta")
    group = pipe.enable_group_offload
    monkeypatch.setattr(pipe, "enable_group_offload", lambda **given: group(**given | {"onload_device": cpu}))

    def sequential(device):
        cpu_offload(pipe.transformer, execution_device=cpu)

    def whole(device):
        pipe._all_hooks = [cpu_offload_with_hook(pipe.transformer, execution_device=cpu)[1]]

    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", sequential)
    monkeypatch.setattr(pipe, "enable_model_cpu_offload", whole)


OFFLOADS = [
    {"mode": "group", "type": "leaf_level"},
    {"mode": "group", "type": "block_level", "blocks": 1},
    {"mode": "sequential"},
    {"mode": "model"},
]


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
        assert torch.equal(generate(pipe, preset), expected)
        assert any(call.reason is None for call in acceleration.report().calls)
    assert torch.equal(generate(pipe, preset), stock)


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


def test_streams_are_refused_on_an_accelerator_without_them(monkeypatch):
    monkeypatch.setattr("dit_accel.extras_install._accelerator", lambda: "mps")
    preset = with_extras(WAN, offload={"mode": "group", "stream": True})
    with pytest.raises(UnsupportedError, match=r"extras\.offload: stream is for CUDA and XPU devices.*mps"):
        accelerate(pipeline_of(preset.tiny), preset)


def test_model_and_sequential_offload_switch_diffusers_on_once(monkeypatch):
    monkeypatch.setattr("dit_accel.extras_install._accelerator", lambda: "cuda")
    for mode, method in (("model", "enable_model_cpu_offload"), ("sequential", "enable_sequential_cpu_offload")):
        pipe, called = tiny_pipeline(load_preset(WAN).tiny), []
        monkeypatch.setattr(pipe, method, lambda device, called=called: called.append(device))
        accelerate(pipe, with_extras(WAN, offload={"mode": mode})).remove()
        assert called == [torch.device("cuda")]
    with pytest.raises(UnsupportedError, match="needs a pipeline"):
        accelerate(pipe.transformer, with_extras(WAN, offload={"mode": "model"}))


def test_quantisation_is_refused_where_it_cannot_be_made(monkeypatch):
    preset = with_extras(WAN, quantization={"backend": "torchao"})
    with pytest.raises(UnsupportedError, match=r"extras\.quantization: transformer is loaded already"):
        accelerate(pipeline_of(preset.tiny), preset)
    with pytest.raises(ConfigError, match="the tiny model is not loaded"):
        load_for_preset(preset, "tiny")
    monkeypatch.setattr(extras_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao needs torchao: pip install torchao"):
        load_for_preset(preset, "samples/tiny-wan")
    with pytest.raises(ConfigError, match="bitsandbytes_4bit needs bitsandbytes"):
        quantization_config(Quantization(backend="bitsandbytes_4bit"))


def test_weights_of_torchao_run_under_sparse_attention():
    pytest.importorskip("torchao", reason="torchao is not installed")
    shipped = load_preset("tiny-wan/radial")
    preset = shipped.model_copy(update={"extras": Extras(quantization={"backend": "torchao"})})
    pipe = load_for_preset(preset, None, "cpu", "float32")
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    with accelerate(pipe, preset, break_even=1.0, dense_steps=0, dense_layers=0) as acceleration:
        frames = torch.as_tensor(pipe(prompt="a red ball", **size, output_type="np").frames)
        assert {call.reason for call in acceleration.report().calls} == {None}
    assert torch.isfinite(frames).all()


@pytest.mark.parametrize("backend", ["bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_bitsandbytes_is_refused_without_an_accelerator(backend, monkeypatch):
    monkeypatch.setattr(extras_module.importlib.util, "find_spec", lambda name: object())
    for device in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=f"{backend} on an accelerator only"):
        load_for_preset(with_extras(WAN, quantization={"backend": backend}), "samples/tiny-wan")


def test_torchao_types_are_found_by_name_only(monkeypatch):
    package, module = ModuleType("torchao"), ModuleType("torchao.quantization")
    module.Int8WeightOnlyConfig = type("Int8WeightOnlyConfig", (), {})
    module.quantize_ = lambda: None
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    assert isinstance(extras_module._torchao_type("Int8WeightOnlyConfig"), module.Int8WeightOnlyConfig)
    for wrong in ("quantize_", "NoSuchConfig", 3):
        with pytest.raises(ConfigError, match="expected the name of a config class"):
            extras_module._torchao_type(wrong)


def test_extras_stand_in_summary_and_report():
    preset = cached(IMAGE, "first_block")
    with accelerate(pipeline_of(preset.tiny), preset, method="dense") as acceleration:
        assert "first_block" in acceleration.summary()
        assert acceleration.report().to_dict()["settings"]["extras"]["cache"]["name"] == "first_block"
