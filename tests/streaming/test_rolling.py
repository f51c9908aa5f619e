"""The rolling window: its schedule, what it sees, and that it gives back what an oracle knows."""

from __future__ import annotations

import pytest
import torch
from stream_cases import FRAME, latents, text, tiny_transformer

from dit_accel.pipelines.streaming.attention import CLEAN
from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.rolling import RollingDriver, make_driver
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings

LEVELS = (1000.0, 800.0, 500.0)
ROLLING = {"steps": LEVELS, "chunk": 2, "window": 11, "sink": 2, "positions": "sink_adjacent", "rolling": True}


class Recorder:
    """Stands for the runtime: keeps every call and lets an oracle or the real runtime answer."""

    def __init__(self, runtime, oracle=None):
        self.runtime, self.oracle, self.calls = runtime, oracle, []
        self.transformer = runtime.transformer

    def branch(self, *args):
        return self.runtime.branch(*args)

    def forward(self, branch, x, timesteps, start, **options):
        past = list(options.get("past") or [])
        assert set(past) <= set(branch.cache.kept)
        self.calls.append((start, x.shape[2], timesteps, options["step"], past, x))
        out = self.runtime.forward(branch, x, timesteps, start, **options)
        if self.oracle is None or options["step"] == CLEAN:
            return out
        sigma = torch.tensor(timesteps).view(1, 1, -1, 1, 1) / 1000
        return (x - self.oracle[:, :, start : start + x.shape[2]]) / sigma


@pytest.fixture(scope="module")
def runtime():
    return CausalWan(tiny_transformer())


def rolling(runtime, chunks, seed=0, oracle=None, negative=None, **changes):
    recorder = Recorder(runtime, oracle)
    settings = StreamSettings(**{**ROLLING, **changes})
    return RollingDriver(recorder, settings, text(), FRAME, seed, negative=negative, chunks=chunks), recorder


def drain(stream):
    return list(iter(stream.next, None))


@pytest.mark.parametrize("chunks", [1, 2, 3, 7])
def test_schedule(runtime, chunks):
    stream, recorder = rolling(runtime, chunks)
    made = drain(stream)
    assert [chunk.frames.start for chunk in made] == list(range(0, 2 * chunks, 2))
    windows = [call for call in recorder.calls if call[3] != CLEAN]
    assert len(windows) == chunks + len(LEVELS) - 1
    met = {chunk: [] for chunk in range(chunks)}
    for start, length, timesteps, *_ in windows:
        assert timesteps == sorted(timesteps)
        for place in range(length // 2):
            met[start // 2 + place].append(timesteps[2 * place])
    assert all(levels == list(stream.ladder.timesteps) for levels in met.values())
    newest = [timesteps[-1] for start, length, timesteps, *_ in windows[:chunks]]
    assert newest == [1000.0] * chunks


def test_an_oracle_gets_its_video_back(runtime):
    oracle = latents(14, seed=4)
    stream, _ = rolling(runtime, 7, oracle=oracle)
    torch.testing.assert_close(torch.cat([x.latents for x in drain(stream)], 2), oracle, atol=1e-5, rtol=1e-5)


def test_what_windows_and_clean_passes_see(runtime):
    stream, recorder = rolling(runtime, 14)
    drain(stream)
    for start, length, _, step, past, _ in recorder.calls:
        if step == CLEAN:
            assert past == list(range(max(0, start + 2 - 11), start))
            continue
        assert len(past) + length <= 11
        recent = [f for f in past if f >= 2]
        assert recent == list(range(max(2, start - (11 - 2 - length)), start))
        assert past[: len(past) - len(recent)] == ([0, 1] if start else [])


def test_one_level_equals_the_sequential_loop(runtime):
    changes = {"steps": (1000.0,), "window": 12}
    one, _ = rolling(runtime, 4, **changes)
    settings = StreamSettings(**{**ROLLING, **changes, "rolling": False})
    other = ChunkDriver(runtime, settings, text(), FRAME, chunks=4)
    for a, b in zip(drain(one), drain(other), strict=True):
        torch.testing.assert_close(a.latents, b.latents, atol=1e-5, rtol=1e-5)


def test_endless_driver_makes_the_same_as_a_bounded_one_until_it_winds_down(runtime):
    bounded, _ = rolling(runtime, 6)
    endless, _ = rolling(runtime, None)
    whole = drain(bounded)
    for chunk in whole[:4]:
        assert torch.equal(endless.next().latents, chunk.latents)


def test_every_noise_is_drawn_once_and_finished_chunks_are_not_noised(runtime):
    stream, _ = rolling(runtime, 5)
    drawn, draw = [], stream.noise.draw

    def spy(frames, step=-1):
        drawn.append((frames.start, step))
        return draw(frames, step)

    stream.noise.draw = spy
    drain(stream)
    assert sorted(drawn) == sorted((2 * i, step) for i in range(5) for step in (-1, 1, 2))


def test_resume_with_chunks_in_flight(runtime):
    stream, _ = rolling(runtime, None)
    for _ in range(4):
        stream.next()
    other, _ = rolling(runtime, None, seed=5)
    other.load_state_dict(stream.state_dict())
    for _ in range(3):
        assert torch.equal(other.next().latents, stream.next().latents)


def test_sink_and_memory_over_a_thousand_chunks():
    runtime = CausalWan(tiny_transformer(layers=1, heads=1, head_dim=12))
    changes = {"steps": (1000.0, 500.0), "chunk": 1, "window": 5, "sink": 1}
    stream = make_driver(runtime, StreamSettings(**{**ROLLING, **changes}), text(), (4, 4))
    for _ in range(8):
        stream.next()
    cache, sizes = stream.branches[0].cache, set()
    sink = [x.clone() for x in cache.read(0, [0])]
    for _ in range(1000):
        stream.next()
        sizes.add((stream.bytes, len(stream.flight), len(stream._recent)))
    assert len(sizes) == 1
    assert all(torch.equal(a, b) for a, b in zip(sink, cache.read(0, [0]), strict=True))


def test_a_switch_holds_for_the_chunks_in_flight(runtime):
    plain, _ = rolling(runtime, 8)
    stream, _ = rolling(runtime, 8)
    before = [stream.next() for _ in range(3)]
    stream.switch(text(1), "recache")
    whole = [*before, *drain(stream)]
    for index, (a, b) in enumerate(zip(drain(plain), whole, strict=True)):
        assert torch.equal(a.latents, b.latents) == (index < 3)


@pytest.mark.parametrize("keep_sink", [True, False])
def test_after_a_switch_both_branches_see_the_same_cached_frames(runtime, keep_sink):
    changes = {"negative": text(5), "guidance_scale": 2.0, "keep_sink": keep_sink}
    stream, recorder = rolling(runtime, None, **changes)
    for _ in range(9):
        stream.next()
    stream.switch(text(1), "recache")
    first, second = (branch.cache.kept for branch in stream.branches)
    assert first == second
    recorder.calls.clear()
    stream.next()
    windows = [call for call in recorder.calls if call[3] != CLEAN]
    assert len(windows) == 2
    assert windows[0][4] == windows[1][4] != []


def test_finished_chunks_never_change_afterwards(runtime):
    stream, _ = rolling(runtime, 6)
    made, copies = [], []
    for chunk in iter(stream.next, None):
        made.append(chunk.latents)
        copies.append(chunk.latents.clone())
    assert len(made) == 6
    assert all(torch.equal(a, b) for a, b in zip(made, copies, strict=True))


def test_attention_over_a_rolled_window_does_not_know_the_absolute_time(runtime):
    sink, branches = latents(2, seed=8), []
    for start in (2, 402):
        branch = runtime.branch(StreamSettings(**ROLLING), text())
        runtime.forward(branch, sink, 0.0, 0)
        branch.cache.end = start  # as if everything in between had come and gone
        branches.append(runtime.forward(branch, latents(2, seed=9), 0.0, start, past=[0, 1]))
    torch.testing.assert_close(*branches, atol=1e-4, rtol=0)
