"""Training of the causal small model: its pass is that of a stream, its past is what a stream has seen."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import WanTransformer3DModel
from stream_cases import FRAME, latents, text, tiny_transformer

from dit_accel.models import shipped_model
from dit_accel.pipelines.streaming import CausalWan, StreamingWanPipeline
from dit_accel.samples.judge import describe
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.samples.tiny_wan_causal import CausalTeacher, Excerpt, draw_excerpt, visible_frames
from dit_accel.samples.tiny_wan_recipes import SMALL, Pace
from dit_accel.samples.tiny_wan_run import Place
from dit_accel.samples.tiny_wan_vae import Bank
from dit_accel.samples.train_tiny_wan_causal import excerpts, train_causal
from dit_accel.streaming import StreamSettings

GRID = (FRAME[0] // 2, FRAME[1] // 2)
SETTINGS = StreamSettings(chunk=2, window=8, sink=2, positions="reindex")


def streamed(model, settings, chunks, noisy, levels, words):
    """Velocity of every noisy chunk after the clean ones before it, by the runtime: `[1, n, C, F, h, w]`."""
    found = []
    with CausalWan(model) as runtime:
        branch = runtime.branch(settings, words)
        for at, (clean, mixed, level) in enumerate(zip(chunks, noisy, levels, strict=True)):
            start = at * settings.chunk
            found.append(runtime.forward(branch, mixed, 1000 * float(level), start, step=0))
            runtime.forward(branch, clean, 0.0, start)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize(
    ("chunk", "window", "sink", "positions"),
    [(2, 8, 2, "reindex"), (2, 5, 1, "reindex"), (1, 3, 1, "sink_adjacent"), (3, None, 0, "absolute")],
)
@torch.no_grad()
def test_the_training_pass_is_what_a_stream_computes(chunk, window, sink, positions):
    settings = StreamSettings(chunk=chunk, window=window, sink=sink, positions=positions)
    model, words, count = tiny_transformer(), text(), 4
    clip = latents(count * chunk)
    chunks, noise = clip.split(chunk, 2), latents(count * chunk, seed=1).split(chunk, 2)
    levels = torch.tensor([0.9, 0.2, 0.6, 0.75])
    noisy = [(1 - level) * c + level * n for level, c, n in zip(levels, chunks, noise, strict=True)]
    expected = streamed(model, settings, chunks, noisy, levels, words)
    excerpt = Excerpt.of(settings, 1, count - 1)
    assert excerpt.given == count - 1
    entries = torch.stack([*chunks[:-1], *noisy], dim=1)
    given = torch.cat([torch.zeros(count - 1), levels])[None]
    found = CausalTeacher(model, GRID, 3.0).velocity(excerpt, entries, given, words)
    torch.testing.assert_close(found[:, excerpt.given :], expected, atol=1e-5, rtol=1e-4)
    half = CausalTeacher(model, GRID, 3.0, is_half=True).velocity(excerpt, entries, given, words)
    assert 0 < (half[:, excerpt.given :] - expected).norm() / expected.norm() < 0.02


def test_an_excerpt_from_later_learns_only_chunks_whose_whole_past_it_has():
    seen = visible_frames(SETTINGS, 9)
    assert seen[0] == [0, 1]
    assert seen[8] == [0, 1, 12, 13, 14, 15, 16, 17]
    excerpt = Excerpt.of(SETTINGS, 5, 8)
    assert [x.start for x in excerpt.chunks] == [0, 10, 12, 14, 0, 14, 16]
    assert excerpt.given == 4
    frames = [frame for chunk in excerpt.chunks for frame in chunk]
    for entry, keys in enumerate(excerpt.keys[4:], start=4):
        assert [frames[key] for key in keys] == seen[excerpt.chunks[entry].start // 2]
        assert excerpt.positions[entry] == tuple(map(float, range(len(keys))))
    # The past itself sees no frame that is not there, and nothing noisy.
    past = [[frames[key] for key in keys] for keys in excerpt.keys[:3]]
    assert past == [[0, 1], [0, 1, 10, 11], [0, 1, *range(10, 14)]]
    assert all(key < 8 for keys in excerpt.keys[:4] for key in keys)


def test_the_excerpts_of_a_clip_stay_inside_it():
    kinds = excerpts(SETTINGS, 33)
    assert [len(kind) for kind in kinds] == [1, 1, 11]
    opening = kinds[0][0]
    assert (opening.chunks, opening.given, opening.keys[1]) == ((range(2), range(2)), 1, (2, 3))
    assert max(chunk.stop for kind in kinds for excerpt in kind for chunk in excerpt.chunks) == 32
    torch.manual_seed(0)
    drawn = [draw_excerpt(kinds) for _ in range(40)]
    assert 5 < drawn.count(opening) < 25


@torch.no_grad()
def test_what_the_model_makes_of_the_past_leaves_the_sink_as_it_is():
    teacher, excerpt = CausalTeacher(tiny_transformer(), GRID, 3.0), Excerpt.of(SETTINGS, 1, 3).past()
    past = excerpt.cut(latents(8), 2)
    remade = teacher.remake(excerpt, past, text())
    assert torch.equal(remade[:, 0], past[:, 0])
    assert all(not torch.equal(remade[:, i], past[:, i]) for i in range(1, excerpt.given))


def test_noise_in_the_future_changes_no_earlier_loss():
    teacher, excerpt = CausalTeacher(tiny_transformer(), GRID, 3.0), Excerpt.of(SETTINGS, 1, 3)
    chunks = excerpt.cut(latents(8), 2).requires_grad_()
    levels = torch.full((1, len(excerpt.chunks)), 0.5)
    out = teacher.velocity(excerpt, chunks, levels, text())
    out[:, excerpt.given + 1].sum().backward()
    moved = chunks.grad.flatten(2).abs().amax(-1)[0] > 0
    # Chunk 1 depends on itself and on the clean chunk 0: not on its own clean copy, nor on anything later or noisy.
    assert moved.tolist() == [True, False, False, False, True, False, False]


@pytest.fixture
def start(tmp_path):
    folder = tmp_path / "start"
    pipe = random_wan_pipeline()
    torch.nn.init.normal_(pipe.transformer.proj_out.weight, std=0.1)
    pipe.save_pretrained(folder)
    return folder


def test_a_killed_training_goes_on_and_its_export_streams(start, tmp_path):
    config = json.loads((start / "transformer" / "config.json").read_text())
    torch.manual_seed(3)
    bank = Bank(
        torch.randn(3, config["in_channels"], 16, 4, 6).half(),
        torch.rand(3, 16, 4, 6) > 0.8,
        ["a red ball moving right", "a blue square moving up", "a pink star moving left"],
    )
    output = tmp_path / "causal"
    place, recipe = Place(tmp_path), replace(SMALL.causal, pace=Pace(2), save_every=1)
    train_causal(place, output, str(start), bank, SETTINGS, recipe)
    state = torch.load(tmp_path / "causal_checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    train_causal(place, output, str(start), bank, SETTINGS, replace(recipe, pace=Pace(3)))
    later = torch.load(tmp_path / "causal_checkpoint.pt", weights_only=True)
    assert later["step"] == 3
    assert later["optimizers"][1]["state"][0]["step"] == 3
    before, after = (WanTransformer3DModel.from_pretrained(x / "transformer") for x in (start, output))
    name = "blocks.0.attn1.to_q.weight"
    assert not torch.equal(before.state_dict()[name], after.state_dict()[name])
    torch.testing.assert_close(after.state_dict()[name], later["average"][name], atol=2e-3, rtol=2e-3)
    kept = [f.relative_to(start) for f in start.rglob("*") if f.is_file() and "transformer" not in f.parts]
    assert kept
    assert all((output / f).read_bytes() == (start / f).read_bytes() for f in kept)
    pipe = StreamingWanPipeline.from_pretrained(output)
    chunk = next(pipe.stream("a red ball", height=16, width=24, settings={"steps": [1000.0], "window": 8}))
    assert chunk.frames.shape[1:] == (16, 24, 3)


@pytest.fixture(scope="module")
def shipped():
    return StreamingWanPipeline.from_preset("tiny-wan-causal")


def test_the_shipped_causal_model_shares_all_but_its_transformer_with_the_bidirectional_one(shipped):
    folder, base = shipped_model("tiny-wan-causal"), shipped_model("tiny-wan")
    kept = [f.relative_to(base) for f in base.rglob("*") if f.is_file() and f.parent != base]
    kept = [f for f in kept if f.parts[0] != "transformer"]
    assert all((folder / f).read_bytes() == (base / f).read_bytes() for f in kept)
    assert sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) < 40e6
    one, other = (json.loads((x / "transformer" / "config.json").read_text()) for x in (folder, base))
    assert {k: v for k, v in one.items() if k[0] != "_"} == {k: v for k, v in other.items() if k[0] != "_"}


def test_the_shipped_causal_model_keeps_its_object(shipped):
    steps = {"steps": [1000.0, 750.0, 500.0, 250.0]}  # half of those it is made for, for speed
    stream = shipped.stream("a red ball moving right", seed=0, num_chunks=2, settings=steps)
    shown = [describe(np.round(chunk.frames * 255).astype(np.uint8)) for chunk in stream]
    found = [(chunk["color"], chunk["shape"], chunk["background"]) for chunk in shown]
    assert found == [("red", "ball", "black")] * 2
