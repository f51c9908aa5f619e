"""The loop of a stream: chunks, guidance, prompt changes, resuming, and what must not change over a thousand chunks."""

from __future__ import annotations

import pytest
import torch
from stream_cases import FRAME, latents, text, tiny_transformer

from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.ladder import Ladder
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings

SHORT = {"steps": (1000.0, 500.0), "chunk": 2, "window": 8, "sink": 2}


@pytest.fixture(scope="module")
def runtime():
    return CausalWan(tiny_transformer())


def driver(runtime, prompt=0, seed=0, **changes):
    negative = changes.pop("negative", None)
    settings = StreamSettings(**{**SHORT, **changes})
    return ChunkDriver(runtime, settings, text(prompt), FRAME, seed, negative=negative)


def make(stream, count):
    return torch.cat([stream.next().latents for _ in range(count)], dim=2)


def cached(stream, branch=0):
    cache = stream.branches[branch].cache
    return {f: tuple(torch.stack(cache.read(i, [f])) for i in range(cache.layers)) for f in cache.kept}


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_chunk_is_what_the_algorithm_says(runtime):
    stream = driver(runtime)
    first, second = stream.next(), stream.next()
    assert (list(first.frames), list(second.frames)) == ([0, 1], [2, 3])
    ladder, settings = Ladder.of(stream.settings), stream.settings
    branch = runtime.branch(settings, text())
    for chunk in (first, second):
        x = stream.noise.draw(chunk.frames)
        for step in (0, 1):
            sigma = ladder.timesteps[step] / 1000
            x = x - sigma * runtime.forward(branch, x, ladder.timesteps[step], chunk.frames.start, step=step)
            if step == 0:
                sigma = ladder.timesteps[1] / 1000
                x = (1 - sigma) * x + sigma * stream.noise.draw(chunk.frames, 1)
        torch.testing.assert_close(chunk.latents, x, atol=1e-5, rtol=1e-5)
        runtime.forward(branch, chunk.latents, 0.0, chunk.frames.start)


def test_euler_ends_where_the_ode_ends(runtime):
    stream = driver(runtime, sampler="euler")
    oracle = latents(2, seed=9)

    def forward(branch, x, timestep, start, **_):
        return (x - oracle) / (timestep / 1000)

    stream.runtime = type("Oracle", (), {"forward": staticmethod(forward), "transformer": runtime.transformer})()
    torch.testing.assert_close(stream.next().latents, oracle)


def test_guidance_runs_two_caches(runtime):
    with_two = driver(runtime, negative=text(5), guidance_scale=3.0)
    plain, same_text = driver(runtime), driver(runtime, negative=text(0), guidance_scale=3.0)
    guided = make(with_two, 3)
    assert len(with_two.branches) == 2
    assert (guided - make(plain, 3)).abs().max() > 1e-3
    torch.testing.assert_close(make(same_text, 3), make(driver(runtime), 3), atol=1e-4, rtol=1e-4)
    assert not same(cached(with_two, 0)[0], cached(with_two, 1)[0])
    assert len(driver(runtime, negative=text(5)).branches) == 1


def test_given_frames_begin_the_stream(runtime):
    stream, start = driver(runtime, first_chunk=1), latents(4, seed=3)
    given = stream.give(start)
    assert [list(x.frames) for x in given] == [[0], [1, 2], [3]]
    assert torch.equal(torch.cat([x.latents for x in given], 2), start)
    following = stream.next()
    assert list(following.frames) == [4, 5]
    branch = runtime.branch(stream.settings, text())
    for chunk in given:
        runtime.forward(branch, chunk.latents, 0.0, chunk.frames.start)
    assert stream.made == 1
    old = [torch.stack(branch.cache.read(0, [f])) for f in range(4)]
    assert same(old, [cached(stream)[f][0] for f in range(4)])


def test_the_number_of_chunks_ends_the_stream(runtime):
    stream = ChunkDriver(runtime, StreamSettings(**SHORT), text(), FRAME, chunks=2)
    assert [stream.next() is None for _ in range(4)] == [False, False, True, True]


def test_same_seed_same_stream_and_other_seed_another(runtime):
    assert torch.equal(make(driver(runtime), 3), make(driver(runtime), 3))
    assert not torch.equal(make(driver(runtime), 1), make(driver(runtime, seed=1), 1))


@pytest.mark.parametrize("mode", ["cut", "recache", "blend", "keep"])
@pytest.mark.parametrize("at", [1, 6])
def test_a_switch_leaves_what_was_made_and_changes_what_follows(runtime, mode, at):
    plain = make(driver(runtime), at + 3)
    runs = []
    for _ in (0, 1):
        stream = driver(runtime)
        before = make(stream, at)
        stream.switch(text(1), mode, over=2)
        runs.append(torch.cat([before, make(stream, 3)], dim=2))
    assert torch.equal(*runs)
    assert torch.equal(runs[0][:, :, : 2 * at], plain[:, :, : 2 * at])
    assert (runs[0][:, :, 2 * at :] - plain[:, :, 2 * at :]).abs().amax((0, 1, 3, 4)).min() > 1e-4


def test_recache_keeps_the_sink_and_replaces_the_rest(runtime):
    stream = driver(runtime)
    make(stream, 6)
    stream.flush()
    before = cached(stream)
    stream.switch(text(1), "recache")
    after = cached(stream)
    assert list(before) == list(after) == [0, 1, 6, 7, 8, 9, 10, 11]
    assert [same(before[f], after[f]) for f in before] == [True] * 2 + [False] * 6
    recent = torch.cat([x.latents for x in stream._recent], 2)[:, :, -6:]
    branch = runtime.branch(stream.settings, text(1))
    branch.cache.load_state_dict(stream.branches[0].cache.state_dict())
    runtime.forward(branch, recent, 0.0, 6)
    assert all(same(after[f], [torch.stack(branch.cache.read(i, [f])) for i in (0, 1)]) for f in after)


def test_recache_without_the_sink_replaces_everything(runtime):
    stream = driver(runtime, keep_sink=False)
    make(stream, 6)
    stream.flush()
    before = cached(stream)
    stream.switch(text(1), "recache")
    after = cached(stream)
    assert list(after) == list(range(4, 12))
    assert stream.branches[0].cache.slot(4) == 0
    assert not any(same(before[f], after[f]) for f in after if f in before)


def test_recache_without_the_sink_leaves_both_branches_with_the_same_frames(runtime):
    stream = driver(runtime, keep_sink=False, guidance_scale=2.0, negative=text(5), recache="causal")
    make(stream, 6)
    stream.flush()
    uncond = cached(stream, 1)
    stream.switch(text(1), "recache")
    for _ in range(3):
        first, second = (cached(stream, branch) for branch in (0, 1))
        assert list(first) == list(second)
        stream.next()
        stream.flush()
    # Its prompt is the old one: a causal recache from a frame on gives it what a stream that begins there has.
    fresh = runtime.branch(stream.settings, text(5))
    fresh.cache.restart(4)
    again = driver(runtime, keep_sink=False, guidance_scale=2.0, negative=text(5), recache="causal")
    make(again, 6)
    again.switch(text(1), "recache")
    for chunk in again._recent:
        runtime.forward(fresh, chunk.latents, 0.0, chunk.start)
    after = cached(again, 1)
    assert all(same(after[f], [torch.stack(fresh.cache.read(i, [f])) for i in (0, 1)]) for f in after)
    assert not same(after[6], uncond[6])


@pytest.mark.parametrize("keep_sink", [True, False])
def test_causal_recache_under_the_same_prompt_changes_nothing(runtime, keep_sink):
    stream = driver(runtime, recache="causal", keep_sink=keep_sink, window=9, sink=1)
    make(stream, 4)
    stream.flush()
    before = cached(stream)
    stream.switch(text(0), "recache")
    after = cached(stream)
    for frame in before:
        for x, y in zip(before[frame], after[frame], strict=True):
            torch.testing.assert_close(x, y, atol=1e-5, rtol=0)


def test_released_recache_under_the_same_prompt_differs(runtime):
    stream = driver(runtime)
    make(stream, 3)
    stream.flush()
    before = cached(stream)
    stream.switch(text(0), "recache")
    assert not same(before[2], cached(stream)[2])


def test_cut_begins_a_new_scene(runtime):
    stream = driver(runtime, positions="reindex")
    make(stream, 4)
    stream.switch(text(1), "cut")
    stream.next()
    stream.flush()
    assert stream.branches[0].cache.kept == [8, 9]
    # A stream that begins with the same noise under the new prompt makes the same chunk.
    fresh = driver(runtime, prompt=1, positions="reindex")
    fresh.frame = 8
    fresh.branches[0].cache.restart(8)
    assert torch.equal(fresh.next().latents, stream._recent[-1].latents)


def test_blend_moves_to_the_new_prompt(runtime):
    stream = driver(runtime)
    make(stream, 2)
    stream.switch(text(1), "blend", over=4)
    seen = []
    for _ in range(5):
        stream.next()
        seen.append(stream.branches[0].text)
    shares = [float(((x - text(0)) / (text(1) - text(0))).mean()) for x in seen]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0], abs=1e-4)
    assert torch.equal(seen[3], text(1))


def test_a_first_chunk_may_fill_the_window(runtime):
    stream = driver(runtime, first_chunk=8)
    make(stream, 3)
    stream.switch(text(1), "recache")
    assert stream.next().latents.isfinite().all()
    assert stream.branches[0].cache.kept == [0, 1, *range(8, 12)]


def test_stretched_frequencies_and_antiphase_noise_are_off_by_default_and_change_the_stream(runtime):
    plain = make(driver(runtime), 3)
    off = {"frequencies": {"mode": "by_parts", "target": 21}, "antiphase": 0.0}
    assert torch.equal(make(driver(runtime, **off), 3), plain)
    for change in ({"frequencies": {"mode": "by_parts"}}, {"frequencies": {"mode": "riflex"}}, {"antiphase": 0.2}):
        assert (make(driver(runtime, **change), 3) - plain).abs().max() > 1e-4


@pytest.mark.parametrize("changes", [{}, {"guidance_scale": 2.0, "negative": text(5)}, {"antiphase": 0.3}])
def test_resume_goes_on_bit_for_bit(runtime, changes):
    stream = driver(runtime, **changes)
    make(stream, 5)
    stream.switch(text(1), "blend", over=3)
    stream.next()
    other = driver(runtime, seed=99, **changes)
    other.load_state_dict(stream.state_dict())
    assert torch.equal(make(other, 3), make(stream, 3))


def test_a_thousand_chunks_with_fifty_switches():
    runtime = CausalWan(tiny_transformer(layers=1, heads=1, head_dim=12))
    settings = StreamSettings(steps=(1000.0,), chunk=1, window=4, sink=1, positions="reindex")
    stream = ChunkDriver(runtime, settings, text(), (4, 4))
    make(stream, 5)
    sink, kept, texts = cached(stream)[0], [], [text(i) for i in range(2)]
    for chunk in range(1000):
        if chunk % 20 == 0:
            stream.switch(texts[chunk // 20 % 2], "recache")
        stream.next()
        if chunk % 100 == 0:
            kept.append((stream.bytes, len(stream._recent), len(stream.branches[0].text_kv)))
    assert stream.frame == 1005
    assert len(set(kept)) == 1
    assert same(sink, cached(stream)[0])
