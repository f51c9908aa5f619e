"""`StreamingWanPipeline`: chunks of frames, live prompts, resuming, and the pipeline it still is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.decoder import LatentScale
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.planned import PlannedContext
from dit_accel.pipelines.streaming.stream import join_frames
from dit_accel.samples.tiny_random.wan import random_wan_pipeline
from dit_accel.streaming import BLEND_CHUNKS, STREAM_PRESETS, stream_settings

SIZE = {"height": 16, "width": 24}
SETTINGS = {"steps": (1000.0, 500.0), "chunk": 2, "window": 6, "sink": 2}
RED, BLUE = "a red ball moving right", "a blue square moving down"


@pytest.fixture(scope="module")
def pipe():
    return StreamingWanPipeline(**random_wan_pipeline().components)


def begin(pipe, prompt=RED, **changes):
    settings = {**SETTINGS, **changes.pop("settings", {})}
    return pipe.stream(prompt, settings=settings, **SIZE, **changes)


def test_chunks_follow_each_other_without_a_seam(pipe):
    chunks = list(begin(pipe, num_chunks=4))
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [chunk.first_frame for chunk in chunks] == [0, 3, 7, 11]
    video = join_frames(chunks)
    assert video.shape == (15, 16, 24, 3)
    assert video.dtype == np.float32
    latents = LatentScale(pipe.vae).to_vae(torch.cat([chunk.latents for chunk in chunks], 2))
    with torch.no_grad():
        once = pipe.vae.decode(latents).sample[0].permute(1, 2, 3, 0) / 2 + 0.5
    np.testing.assert_allclose(video, once.numpy(), atol=1e-5)


def test_an_endless_stream_begins_like_a_bounded_one(pipe):
    endless = begin(pipe)
    for chunk in begin(pipe, num_chunks=3):
        assert np.array_equal(next(endless).frames, chunk.frames)
    endless.finish()
    assert list(endless) == []


@pytest.mark.parametrize("rolling", [False, True])
def test_a_new_prompt_leaves_earlier_frames_bit_identical(pipe, rolling):
    extra = {"settings": {"rolling": rolling, "positions": "sink_adjacent"}}
    plain, stream, chunks = list(begin(pipe, num_chunks=6, **extra)), begin(pipe, num_chunks=6, **extra), []
    for chunk in stream:
        chunks.append(chunk)
        if chunk.index == 2:
            stream.set_prompt("a green ball", "cut")
            stream.set_prompt(BLUE)
    for index, (a, b) in enumerate(zip(plain, chunks, strict=True)):
        assert np.array_equal(a.frames, b.frames) == (index < 3)
        assert torch.equal(a.latents, b.latents) == (index < 3)
    # Of two changes before a chunk the last one counts.
    again = begin(pipe, num_chunks=6, **extra)
    for chunk in again:
        assert np.array_equal(chunk.frames, chunks[chunk.index].frames)
        if chunk.index == 2:
            again.set_prompt(BLUE)


@pytest.mark.parametrize(
    ("attention", "kind", "values"),
    [
        ({}, DenseContext, {}),
        ({"name": "radial", "parameters": {"density": 0.5}}, PlannedContext, {}),
        ({"name": "light_forcing", "parameters": {"top_frames": 3}}, LightForcing, {"top_frames": 3, "window": 6}),
        ({"name": "flashblock", "parameters": {"refresh_steps": [0]}}, FlashBlock, {"refresh_steps": frozenset({0})}),
        ({"name": "compressed_memory", "parameters": {"tile": [1, 2]}}, CompressedMemory, {"tile": (1, 2)}),
    ],
)
def test_settings_name_the_attention_of_a_stream(pipe, attention, kind, values):
    branches = begin(pipe, settings={"attention": attention, "guidance_scale": 2.0}).driver.branches
    assert len({id(branch.policy) for branch in branches}) == 2
    for branch in branches:
        assert type(branch.policy) is kind
        assert {name: getattr(branch.policy, name) for name in values} == values
    assert stream_settings(attention=attention).model_dump()["attention"]["parameters"] == attention.get(
        "parameters", {}
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": {"name": "lightforcing"}}, r"attention\.name: unknown .* did you mean 'light_forcing'"),
        ({"attention": {"name": "dense", "parameters": {"a": 1}}}, r"attention\.parameters\.a: unknown key"),
        (
            {"attention": {"name": "light_forcing", "parameters": {"top_frames": True}}},
            r"top_frames: expected a valid integer",
        ),
        ({"attention": {"name": "light_forcing", "parameters": {"base": 0.1}}}, "expected 0 <= target <= base"),
        ({"attention": {"name": "radial", "parameters": {"dens": 0.1}}}, "did you mean 'density'"),
        ({"attention": {"name": "compressed_memory"}, "window": None}, "set a window"),
        (
            {"attention": {"name": "compressed_memory"}, "rolling": True, "positions": "sink_adjacent"},
            "set rolling to false",
        ),
    ],
)
def test_wrong_attention_is_named(pipe, settings, message):
    with pytest.raises(ConfigError, match=message):
        begin(pipe, settings=settings)


def test_an_image_of_other_proportions_is_cut_and_not_stretched(pipe):
    inner = np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)
    wide = np.pad(inner, ((0, 0), (10, 10), (0, 0)))
    cut, exact = (begin(pipe, start=Image.fromarray(x), num_chunks=1) for x in (wide, inner))
    assert torch.equal(next(cut).latents, next(exact).latents)


def test_interleaved_streams_do_not_mix(pipe):
    alone = [join_frames(list(begin(pipe, p, seed=s, num_chunks=3))) for s, p in enumerate((RED, BLUE))]
    streams = [begin(pipe, p, seed=s, num_chunks=3) for s, p in enumerate((RED, BLUE))]
    mixed = [[], []]
    for _ in range(3):
        for i in (0, 1):
            mixed[i].append(next(streams[i]))
    assert all(np.array_equal(join_frames(mixed[i]), alone[i]) for i in (0, 1))


@pytest.mark.parametrize("changes", [{}, {"rolling": True, "positions": "sink_adjacent"}, {"guidance_scale": 2.0}])
def test_resume_from_a_file(pipe, tmp_path, changes):
    stream = begin(pipe, settings=changes, negative_prompt=BLUE)
    for _ in range(3):
        next(stream)
    stream.set_prompt(BLUE, "blend", over=3)
    stream.save(tmp_path / "state.safetensors")
    expected = [next(stream) for _ in range(3)]
    other = begin(pipe, settings=changes, negative_prompt=BLUE, seed=9)
    other.load(tmp_path / "state.safetensors")
    for chunk in expected:
        resumed = next(other)
        assert (resumed.index, resumed.first_frame) == (chunk.index, chunk.first_frame)
        assert np.array_equal(resumed.frames, chunk.frames)


def test_a_state_with_other_settings_or_without_a_decoder_is_refused(pipe, tmp_path):
    attention = {"name": "flashblock", "parameters": {"refresh_steps": (0,), "dense_layers": [0]}}
    stream = begin(pipe, settings={"attention": attention})
    first = next(stream)
    stream.save(tmp_path / "state.safetensors")
    other = begin(pipe, settings={"attention": attention}, output_type="latent")
    with pytest.raises(ConfigError, match=r"state: .*decoder is 'StreamingVaeDecoder' there and None here"):
        other.load(tmp_path / "state.safetensors")
    assert torch.equal(next(other).latents, first.latents)
    with pytest.raises(ConfigError, match=r"state: .*settings\.attention\.parameters\.refresh_steps"):
        begin(pipe).load(tmp_path / "state.safetensors")
    again = begin(pipe, settings={"attention": attention})
    again.load(tmp_path / "state.safetensors")
    assert np.array_equal(next(again).frames, next(stream).frames)


def test_start_from_an_image_and_from_a_video(pipe):
    noise = np.random.default_rng(0).integers(0, 255, (5, 16, 24, 3), dtype=np.uint8)
    images = [Image.fromarray(x) for x in noise]
    stream = begin(pipe, start=images[0], settings={"first_chunk": 1}, num_chunks=2)
    chunks = list(stream)
    assert [chunk.given for chunk in chunks] == [True, False, False]
    assert [len(chunk.frames) for chunk in chunks] == [1, 4, 4]
    other = list(begin(pipe, start=images[1], settings={"first_chunk": 1}, num_chunks=2))
    assert not np.array_equal(chunks[1].frames, other[1].frames)
    # Five frames are three latents of this autoencoder.
    chunks = list(begin(pipe, start=images, num_chunks=1))
    assert [list(chunk.latent_frames) for chunk in chunks] == [[0, 1], [2], [3, 4]]
    assert [chunk.given for chunk in chunks] == [True, True, False]
    given = torch.cat([chunk.latents for chunk in chunks if chunk.given], 2)
    assert torch.equal(list(begin(pipe, start=given, num_chunks=1))[2].latents, chunks[2].latents)
    with pytest.raises(ConfigError, match="1 \\+ 4 n frames, got 2"):
        begin(pipe, start=images[:2])


@pytest.mark.parametrize("name", STREAM_PRESETS)
def test_every_published_setting_goes_on_from_an_image(pipe, name):
    image = Image.new("RGB", (24, 16), "red")
    chunks = list(pipe.stream(RED, settings=STREAM_PRESETS[name], start=image, num_chunks=1, **SIZE))
    assert [(chunk.latent_frames, chunk.given) for chunk in chunks] == [(range(1), True), (range(1, 4), False)]
    assert np.isfinite(chunks[1].frames).all()


def test_output_types_and_a_decoder_of_ones_own(pipe):
    assert next(begin(pipe, output_type="latent")).frames is None
    frames = next(begin(pipe, output_type="pt")).frames
    np.testing.assert_array_equal(frames.permute(0, 2, 3, 1).numpy(), next(begin(pipe)).frames)

    class Grey:
        def decode(self, latents):
            return torch.zeros(1, 3, latents.shape[2], 2, 2)

    assert (next(begin(pipe, decoder=Grey())).frames == 0.5).all()


def test_memory_of_a_stream_is_constant(pipe):
    stream = begin(pipe, output_type="latent")
    sizes = [next(stream) and stream.cache_bytes for _ in range(30)]
    assert len(set(sizes[1:])) == 1
    assert sizes[0] > 0


def test_the_pipeline_still_generates_and_saves_as_the_stock_one(pipe, tmp_path):
    stock = random_wan_pipeline()
    begin(pipe)
    arguments = {
        "prompt": RED,
        "num_frames": 5,
        "num_inference_steps": 2,
        "output_type": "np",
        "height": 16,
        "width": 32,
    }
    for x in (pipe, stock):
        x.set_progress_bar_config(disable=True)
    ours, theirs = (x(generator=torch.Generator().manual_seed(0), **arguments).frames for x in (pipe, stock))
    np.testing.assert_array_equal(ours, theirs)
    pipe.end_streams()
    assert type(pipe.transformer.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
    pipe.save_pretrained(tmp_path)
    assert '"WanPipeline"' in (tmp_path / "model_index.json").read_text()
    again = StreamingWanPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(next(begin(again)).frames, next(begin(pipe)).frames, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ["a", "b"]}, "one text per stream"),
        ({"height": 18}, "height: expected a multiple of 4, got 18; 16 would do"),
        ({"settings": {"windows": 3}}, "did you mean 'window'"),
        ({"settings": {"first_chunk": 9, "window": 6}}, "window must hold first_chunk, 9 frames, got 6"),
    ],
)
def test_wrong_arguments_are_named(pipe, arguments, message):
    with pytest.raises(ConfigError, match=message):
        pipe.stream(**{"prompt": RED, **SIZE, **arguments})


def test_two_experts_do_not_stream(pipe):
    two = StreamingWanPipeline(**{**pipe.components, "transformer_2": pipe.transformer}, boundary_ratio=0.875)
    with pytest.raises(UnsupportedError, match="this pipeline has two"):
        begin(two)


@pytest.mark.parametrize(("mode", "over"), [("fade", 1), ("cut", 2), ("blend", 0), ("blend", 1), ("keep", 0)])
def test_wrong_switches_are_named(pipe, mode, over):
    with pytest.raises(ConfigError, match=r"mode|over"):
        begin(pipe).set_prompt(BLUE, mode, over)


def test_a_blend_of_unsaid_length_moves_in_steps(pipe):
    def after(*change):
        stream = begin(pipe, num_chunks=3)
        next(stream)
        stream.set_prompt(BLUE, *change)
        return torch.cat([chunk.latents for chunk in stream], 2)

    assert not torch.equal(after("blend"), after("recache"))
    assert torch.equal(after("blend"), after("blend", BLEND_CHUNKS))


@pytest.mark.parametrize("rolling", [False, True])
def test_of_several_new_prompts_before_a_chunk_the_last_one_counts(pipe, rolling):
    rolled = {"steps": (1000.0, 500.0), "window": 8, "positions": "sink_adjacent", "rolling": True}
    runs = []
    for prompts in ([BLUE], ["a green star", BLUE]):
        stream = begin(pipe, num_chunks=5, settings=rolled if rolling else {})
        chunks = [next(stream), next(stream)]
        for prompt in prompts:
            stream.set_prompt(prompt)
        runs.append(torch.cat([chunk.latents for chunk in (*chunks, *stream)], 2))
    assert torch.equal(*runs)
