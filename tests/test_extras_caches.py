"""Step caches beside sparse attention: what is switched on runs, can be undone, and is refused where wrong."""

from __future__ import annotations

import diffusers
import pytest
import torch
from diffusers import FirstBlockCacheConfig
from extras_cases import CACHES, COG, IMAGE, SPARSE, STEPS, WAN, WAN_TWO, cached, generate, with_extras
from preset_cases import pipeline_of

from dit_accel.acceleration import accelerate
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.extras import cache as extras_cache
from dit_accel.extras.cache import Guidance, enable_cache
from dit_accel.extras.settings import Extras
from dit_accel.families.registry import family_of
from dit_accel.presets import list_presets, load_preset
from dit_accel.samples.tiny_random import tiny_pipeline

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
