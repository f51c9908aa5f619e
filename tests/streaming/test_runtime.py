"""Causal passes: chunk by chunk through the cache equals one pass over the whole video under a block-causal mask."""

from __future__ import annotations

import itertools
import weakref

import pytest
import torch
from stream_cases import block_causal, frame_mask, latents, one_shot, text, tiny_transformer

from dit_accel.errors import PlanError, UnsupportedError
from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings


def run_chunks(runtime, branch, video, chunk, timestep=0.0):
    outs = []
    for start in range(0, video.shape[2], chunk):
        outs.append(runtime.forward(branch, video[:, :, start : start + chunk], timestep, start))
    return torch.cat(outs, dim=2)


@pytest.fixture(scope="module")
def model():
    return tiny_transformer()


@pytest.mark.parametrize(("chunk", "window", "sink"), [(1, None, 0), (3, None, 0), (2, 4, 0), (3, 7, 1), (3, 9, 3)])
@pytest.mark.parametrize("timestep", [0.0, 625.0])
def test_chunks_equal_one_shot_with_block_causal_mask(model, chunk, window, sink, timestep):
    video, prompt = latents(12, batch=2), text(batch=2)
    expected = one_shot(model, video, prompt, frame_mask(block_causal(chunk, window, sink), 12), timestep)
    settings = StreamSettings(chunk=chunk, window=window, sink=sink)
    with CausalWan(model) as runtime:
        got = run_chunks(runtime, runtime.branch(settings, prompt), video, chunk, timestep)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_noisy_chunk_equals_noisy_half_of_the_teacher_forcing_sequence(model):
    clean, noisy, prompt = latents(6), latents(3, seed=1), text()
    # [clean 0-5 | noisy 3-5]: the noisy half sees clean chunks strictly before it, and itself.
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(chunk=3, window=None), prompt)
        runtime.forward(branch, clean[:, :, :3], 0.0, 0)
        got = runtime.forward(branch, noisy, 750.0, 3, step=1)
        runtime.forward(branch, clean[:, :, 3:], 0.0, 3)
    joined = torch.cat([clean[:, :, :3], noisy], dim=2)
    times = [0.0] * 3 + [750.0] * 3
    expected = one_shot(model, joined, prompt, frame_mask(block_causal(3), 6), times)
    torch.testing.assert_close(got, expected[:, :, 3:], atol=1e-4, rtol=0)


def test_chunks_of_different_length_and_a_growing_cache(model):
    video, prompt = latents(10), text()
    cuts = [0, 1, 4, 6, 10]
    mask = frame_mask(lambda q, k: k < next(c for c in cuts if c > q), 10)
    expected = one_shot(model, video, prompt, mask)
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(window=None), prompt)
        got = [runtime.forward(branch, video[:, :, a:b], 0.0, a) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(torch.cat(got, 2), expected, atol=1e-4, rtol=0)


def test_repeating_a_pass_changes_no_slot_outside_the_chunk(model):
    video, prompt = latents(9), text()
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(chunk=3, window=9, sink=3), prompt)
        run_chunks(runtime, branch, video, 3)
        before = [tuple(x.clone() for x in branch.cache.read(layer, list(range(9)))) for layer in range(2)]
        first = runtime.forward(branch, video[:, :, 6:], 500.0, 6, step=2)
        second = runtime.forward(branch, video[:, :, 6:], 500.0, 6, step=2)
        runtime.forward(branch, video[:, :, 6:], 0.0, 6)
        after = [branch.cache.read(layer, list(range(9))) for layer in range(2)]
    assert torch.equal(first, second)
    for old, new in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(old, new, strict=True))


def test_an_aborted_pass_leaves_the_stream_as_it_was(model):
    video, prompt = latents(12), text()
    settings = StreamSettings(chunk=3, window=6)
    with CausalWan(model) as runtime:
        plain = run_chunks(runtime, runtime.branch(settings, prompt), video, 3)
        branch = runtime.branch(settings, prompt)
        outs = [runtime.forward(branch, video[:, :, a : a + 3], 0.0, a) for a in (0, 3, 6)]
        hook = model.blocks[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            runtime.forward(branch, torch.full_like(video[:, :, 9:], 7.0), 0.0, 9)
        hook.remove()
        assert branch.cache.end == 9
        assert runtime.now is None
        outs.append(runtime.forward(branch, video[:, :, 9:], 0.0, 9))
    assert torch.equal(torch.cat(outs, 2), plain)


@pytest.mark.parametrize("positions", ["reindex", "sink_adjacent"])
def test_relative_rules_equal_absolute_until_the_window_is_full(model, positions):
    video, prompt = latents(9), text()
    outs = {}
    with CausalWan(model) as runtime:
        for rule in ("absolute", positions):
            branch = runtime.branch(StreamSettings(chunk=3, window=9, sink=3, positions=rule), prompt)
            outs[rule] = run_chunks(runtime, branch, video, 3)
    torch.testing.assert_close(outs[positions], outs["absolute"], atol=1e-5, rtol=0)


def test_both_relative_rules_agree_when_the_window_rolls(model):
    video, prompt = latents(21), text()
    with CausalWan(model) as runtime:
        outs = [
            run_chunks(runtime, runtime.branch(StreamSettings(window=9, sink=3, positions=rule), prompt), video, 3)
            for rule in ("reindex", "sink_adjacent", "absolute")
        ]
    torch.testing.assert_close(outs[0], outs[1], atol=1e-5, rtol=0)
    assert (outs[0] - outs[2]).abs().max() > 1e-4


def test_relative_rule_does_not_know_how_long_the_stream_is(model):
    video, prompt = latents(9), text()
    with CausalWan(model) as runtime:
        outs = []
        for late in (0, 10_000):
            branch = runtime.branch(StreamSettings(chunk=3, window=9, sink=3, positions="reindex"), prompt)
            branch.cache.restart(late)
            outs.append([runtime.forward(branch, video[:, :, a : a + 3], 0.0, late + a) for a in (0, 3, 6)][-1])
    assert torch.equal(*outs)


def test_absolute_positions_end_with_the_table():
    model = tiny_transformer(layers=1, frames=16)
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(chunk=4, window=8), text())
        for start in (0, 4, 8, 12):
            runtime.forward(branch, latents(4), 0.0, start)
        with pytest.raises(UnsupportedError, match=r"frame 19 is beyond.*16.*reindex"):
            runtime.forward(branch, latents(4), 0.0, 16)


def test_two_streams_on_one_model_do_not_mix(model):
    videos, prompts = [latents(12, seed=s) for s in (0, 1)], [text(s) for s in (0, 1)]
    settings = StreamSettings(chunk=3, window=6)
    with CausalWan(model) as runtime:
        alone = [run_chunks(runtime, runtime.branch(settings, p), v, 3) for v, p in zip(videos, prompts, strict=True)]
        branches = [runtime.branch(settings, p) for p in prompts]
        mixed = [[], []]
        for start in range(0, 12, 3):
            for i in (0, 1):
                mixed[i].append(runtime.forward(branches[i], videos[i][:, :, start : start + 3], 0.0, start))
    for i in (0, 1):
        assert torch.equal(torch.cat(mixed[i], 2), alone[i])


def test_text_is_projected_once_per_prompt_and_forgotten_at_a_change(model):
    calls = []
    hook = model.blocks[0].attn2.to_k.register_forward_hook(lambda *_: calls.append(1))
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(window=9), text(0))
        for start in (0, 3):
            runtime.forward(branch, latents(3), 0.0, start)
        assert len(calls) == 1
        branch.set_text(text(1))
        changed = runtime.forward(branch, latents(3), 0.0, 6)
        assert len(calls) == 2
        fresh = runtime.branch(StreamSettings(window=9), text(1))
        fresh.cache = branch.cache
        assert torch.equal(runtime.forward(fresh, latents(3), 0.0, 6), changed)
    hook.remove()


def test_outside_a_stream_the_model_is_what_it_was(model):
    video, prompt = latents(3), text()
    arguments = {"hidden_states": video, "timestep": torch.tensor([500.0]), "encoder_hidden_states": prompt}
    with torch.no_grad():
        before = model(**arguments).sample
        runtime = CausalWan(model)
        during = model(**arguments).sample
        runtime.close()
        assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"
        assert torch.equal(before, during)


def test_fused_projections_give_the_same():
    model, video, prompt = tiny_transformer(), latents(6), text()
    settings = StreamSettings(chunk=3)
    with CausalWan(model) as runtime:
        plain = run_chunks(runtime, runtime.branch(settings, prompt), video, 3)
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
        fused = run_chunks(runtime, runtime.branch(settings, prompt), video, 3)
    torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)


def test_what_cannot_stream_is_refused():
    model = tiny_transformer(layers=1)
    runtime = CausalWan(model)
    with pytest.raises(UnsupportedError, match="CausalSelfAttention"):
        CausalWan(model)
    runtime.close()
    with pytest.raises(UnsupportedError, match="Linear"):
        CausalWan(torch.nn.Linear(1, 1))
    model._parallel_config = object()
    with pytest.raises(UnsupportedError, match="context parallelism"):
        CausalWan(model)
    model._parallel_config = None
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(chunk=3, window=6), text())
        with pytest.raises(PlanError, match=r"begin in \[0, 0\]"):
            runtime.forward(branch, latents(3), 0.0, 3)
        with pytest.raises(PlanError, match="at most 6 frames"):
            runtime.forward(branch, latents(7), 0.0, 0)


@pytest.mark.parametrize("sink", [0, 3])
def test_reindexed_window_is_the_video_of_its_frames(sink):
    # In one layer a frame's keys do not depend on what it saw, so the window alone decides.
    model, video, prompt = tiny_transformer(layers=1), latents(18), text()
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(chunk=3, window=9, sink=sink, positions="reindex"), prompt)
        got = run_chunks(runtime, branch, video, 3)[:, :, 15:]
    seen = torch.cat([video[:, :, :sink], video[:, :, 18 - 9 + sink :]], dim=2)
    expected = one_shot(model, seen, prompt, frame_mask(lambda q, k: True, 9))[:, :, 6:]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_a_sink_that_takes_spare_mass_must_be_kept():
    q, k, v = torch.randn(1, 6, 1, 8), 0.1 * torch.randn(1, 60, 1, 8), torch.randn(1, 60, 1, 8)
    q[..., 0] = k[:, :6, :, 0] = 8.0
    v[:, :6] = 0

    def attend(keep):
        return torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k[:, keep], v[:, keep]))
        )

    cache = FrameCache(1, 4, 1)
    for frame in range(10):
        cache.make_room(range(frame, frame + 1))
        part = slice(6 * frame, 6 * frame + 6)
        cache.write(0, range(frame, frame + 1), k[:, part], v[:, part])
        cache.commit(range(frame, frame + 1))
    whole, kept = attend(slice(None)), cache.read(0, cache.kept)
    with_sink = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, *kept)))
    without = attend(slice(24, 60))
    assert (with_sink - whole).abs().max() < 1e-3
    assert (without - whole).abs().max() > 100 * (with_sink - whole).abs().max()


def test_nothing_of_an_old_prompt_stays(model):
    with CausalWan(model) as runtime:
        branch = runtime.branch(StreamSettings(window=9), text(0))
        runtime.forward(branch, latents(3), 0.0, 0)
        old = [weakref.ref(x) for pair in branch.text_kv.values() for x in pair]
        branch.set_text(text(1))
        assert len(old) == 4
        assert all(reference() is None for reference in old)


@pytest.mark.parametrize("sink", [0, 3])
def test_a_window_that_is_never_full_changes_nothing(model, sink):
    video, prompt = latents(12), text()
    with CausalWan(model) as runtime:
        endless, bounded = (
            run_chunks(runtime, runtime.branch(StreamSettings(chunk=3, window=window, sink=sink), prompt), video, 3)
            for window in (None, 12)
        )
    assert torch.equal(bounded, endless)
