"""The clip generator, the judge of prompt following, and the small model that ships."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from diffusers import WanPipeline

from dit_accel.models import shipped_model
from dit_accel.samples.cheap_attention import PaddedCrossAttention, dense_in_half
from dit_accel.samples.clips import (
    BACKGROUNDS,
    caption,
    captioned_clips,
    draw_scene,
    is_held_out,
    render,
    render_mask,
    vocabulary,
)
from dit_accel.samples.judge import judge
from dit_accel.samples.muon import orthogonalize
from dit_accel.samples.repertoire import BASIC
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.samples.tiny_wan_flow import Captioner, FrameRope, choose_frames, contrast_gain, velocity_error
from dit_accel.samples.tiny_wan_model import make_tokenizer
from dit_accel.samples.tiny_wan_probe import Probe


def test_clips_are_the_same_for_a_seed():
    first, second = (list(islice(captioned_clips(3, 5, 32, 40), 4)) for _ in range(2))
    for (clip, words, mask), (other_clip, other_words, other_mask) in zip(first, second, strict=True):
        assert words == other_words
        assert np.array_equal(clip, other_clip)
        assert np.array_equal(mask, other_mask)
    assert first[0][0].shape == (5, 32, 40, 3)
    assert first[0][2].shape == (5, 32, 40)


def test_the_mask_covers_the_object_and_nothing_else():
    rng = np.random.default_rng(4)
    for _ in range(20):
        scene = draw_scene(rng)
        clip, mask = render(scene, 5, 64, 64), render_mask(scene, 5, 64, 64)
        assert (clip[~mask] == BACKGROUNDS[scene.background]).all()
        assert (clip[mask] != BACKGROUNDS[scene.background]).any(-1).mean() > 0.9


@torch.no_grad()
def test_chosen_frames_keep_their_places_in_time():
    stock = random_wan_pipeline().transformer.rope
    rope, whole, few = FrameRope(stock, 9), torch.zeros(1, 4, 9, 4, 6), torch.zeros(1, 4, 4, 4, 6)
    rope.chosen = choose_frames(9, 4)
    assert rope.chosen.tolist() == sorted(set(rope.chosen.tolist()) | {0, 8})
    assert len(rope.chosen) == 4
    for table, full in zip(rope(few), stock(whole), strict=True):
        assert torch.equal(table.unflatten(1, (4, -1)), full.unflatten(1, (9, -1))[:, rope.chosen])


def test_held_out_combinations_never_appear_in_training():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        scenes = [draw_scene(rng, held_out) for _ in range(200)]
        assert {is_held_out(s.color, s.shape, s.direction) for s in scenes} == {held_out}


def test_every_caption_is_in_the_vocabulary():
    tokenizer, rng = make_tokenizer(), np.random.default_rng(1)
    captions = [caption(draw_scene(rng), rng) for _ in range(300)]
    assert {word for text in captions for word in text.split()} <= set(vocabulary())
    ids = tokenizer(captions)["input_ids"]
    assert not any(tokenizer.unk_token_id in row for row in ids)
    assert all(row[-1] == tokenizer.eos_token_id for row in ids)
    assert max(map(len, ids)) < 24
    assert tokenizer.unk_token_id in tokenizer("a giraffe")["input_ids"]


def test_the_judge_agrees_with_what_was_drawn():
    rng = np.random.default_rng(2)
    verdicts = []
    for _ in range(60):
        scene = draw_scene(rng)
        verdicts.append(judge(render(scene, 21, 80, 80), scene))
    for criterion in ("color", "shape", "direction", "background"):
        assert sum(v[criterion] for v in verdicts) >= 58


def test_the_judge_tells_a_wrong_clip():
    rng = np.random.default_rng(3)
    scene, other = draw_scene(rng), draw_scene(rng)
    assert scene.color != other.color
    assert not judge(render(other, 21, 80, 80), scene)["color"]
    nothing = judge(np.zeros((5, 80, 80, 3), np.uint8), scene)
    assert not any(nothing[criterion] for criterion in ("color", "shape", "direction"))


def test_muon_makes_orthogonal_updates():
    update = orthogonalize(torch.randn(8, 20, generator=torch.Generator().manual_seed(0)))
    singular = torch.linalg.svdvals(update)
    assert singular.min() > 0.5
    assert singular.max() < 1.5


@torch.no_grad()
def test_one_biased_padding_key_stands_for_all_of_the_pipelines():
    pipe = random_wan_pipeline()
    model = pipe.transformer
    torch.nn.init.normal_(model.condition_embedder.text_embedder.linear_1.bias)
    latents, timestep = torch.randn(2, 4, 3, 4, 4), torch.tensor([500.0, 500.0])
    captions = ["a red ball", ""]
    embeds, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=512)
    stock = model(latents, timestep, embeds, return_dict=False)[0]
    cross = PaddedCrossAttention()
    model.set_attn_processor({n: cross if "attn2" in n else p for n, p in model.attn_processors.items()})
    short = Captioner(pipe.tokenizer, pipe.text_encoder)(captions)
    for given in (short, embeds):
        torch.testing.assert_close(model(latents, timestep, given, return_dict=False)[0], stock, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_pipeline_in_half_makes_nearly_the_same_clip_and_is_itself_again():
    pipe = random_wan_pipeline()
    stock = pipe.transformer.attn_processors

    def call():
        options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "latent"}
        return pipe("a red ball", generator=torch.Generator().manual_seed(0), **options).frames

    wanted = call()
    with dense_in_half(pipe.transformer, BASIC.text_tokens):
        found = call()
    error = (found - wanted).norm() / wanted.norm()
    assert 1e-6 < error < 0.02
    assert pipe.transformer.attn_processors == stock
    assert torch.equal(call(), wanted)


@pytest.fixture(scope="module")
def shipped():
    return WanPipeline.from_pretrained(shipped_model("tiny-wan"))


def test_the_shipped_model_is_small_and_long(shipped):
    folder = shipped_model("tiny-wan")
    files = [f for f in folder.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) < 40e6
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert shipped.transformer.config.attention_head_dim == 64
    assert {p.dtype for p in shipped.transformer.parameters()} == {torch.float32}


def test_the_shipped_model_paints_object_and_background_in_the_colors_of_the_prompt(shipped):
    shipped.set_progress_bar_config(disable=True)
    sampling = {"num_inference_steps": 8, "guidance_scale": 4.0, "output_type": "np"}
    size = {"height": 64, "width": 64, "num_frames": 5}
    frames = {
        prompt: shipped(prompt, generator=torch.Generator().manual_seed(0), **size, **sampling).frames[0]
        for prompt in ("a red ball moving right", "a red ball moving right on a white background")
    }
    on_black, on_white = frames.values()
    is_red = (on_black[..., 0] - on_black[..., 1:].max(-1)) > 0.3
    assert is_red.mean((1, 2)).min() > 0.02
    assert np.median(on_black) < 0.15
    assert np.median(on_white) > 0.8


def test_errors_weigh_more_at_objects_that_hardly_stand_out():
    objects = torch.zeros(4, 2, 6, 6, dtype=torch.bool)
    objects[:3, :, 2:4, 2:4] = True
    backdrop = torch.randn(4, 5, 1, 1, 1).expand(4, 5, 2, 6, 6)
    contrast = torch.tensor([1.0, 2.0, 0.01, 5.0]).view(4, 1, 1, 1, 1)
    gain = contrast_gain(backdrop + contrast.sqrt() * objects.unsqueeze(1), objects)
    assert gain.shape == (4, 1, 1, 1, 1)
    faint, plain, fainter, _ = gain.flatten().tolist()
    assert faint == pytest.approx(2 * plain, rel=1e-4)
    assert faint < fainter < 10
    wanted = torch.randn(4, 5, 2, 6, 6)
    off = wanted + 0.1 * objects.unsqueeze(1)
    alone = [velocity_error(off[n : n + 1], wanted[n : n + 1], objects[n : n + 1], gain[n : n + 1]) for n in range(4)]
    assert alone[0] > alone[1]
    assert alone[3] == 0  # nothing is there to weigh
    assert velocity_error(off, wanted, objects, gain).isfinite()


def test_the_probe_teaches_places_words_and_the_object():
    model = random_wan_pipeline().transformer
    probe = Probe(model, (9, 4, 6), layers=1)
    frames, captions = torch.tensor([0, 3, 8]), ["an orange plus gliding diagonally up to the left", ""]
    objects = torch.zeros(2, 3, 4, 6, dtype=torch.bool)
    objects[0, 1, 2:] = True
    model(
        torch.randn(2, model.config.in_channels, 3, 4, 6),
        torch.tensor([500.0] * 2),
        torch.randn(2, 8, model.config.text_dim),
    )
    loss = probe.loss(frames, captions, objects)
    loss.backward()
    assert model.patch_embedding.weight.grad.abs().sum() > 0
    # A head that names row, column and frame of every token, the words and the object has next to no loss.
    places = torch.cartesian_prod(frames, torch.arange(4), torch.arange(6)).unbind(-1)
    hot = [torch.nn.functional.one_hot(at, n).expand(2, -1, -1) for at, n in zip(places, (9, 4, 6), strict=True)]
    words = torch.tensor([[is_said(text) for is_said in BASIC.meanings] for text in captions])
    assert words.sum(-1).tolist() == [4, 0]  # orange, cross, up, left
    signs = torch.cat([words[:, None].expand(2, 72, -1), objects.flatten(1).unsqueeze(-1)], -1).float() * 2 - 1
    probe.heads[0] = torch.nn.Identity()
    probe._hidden[0] = 100 * torch.cat([*hot, signs], -1)
    assert probe.loss(frames, captions, objects).item() < 1e-6 < loss.item()


def test_every_caption_says_what_its_scene_is():
    rng = np.random.default_rng(5)
    for _ in range(100):
        scene = draw_scene(rng)
        said = sum(is_said(caption(scene, rng)) for is_said in BASIC.meanings)
        # Colour, shape and one or two ways; a black background may go unsaid.
        ways = len(scene.direction.split())
        assert said in ((2 + ways, 3 + ways) if scene.background == "black" else (3 + ways,))
