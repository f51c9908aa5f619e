"""The sink-and-ring cache against a plain list of frames, and its indices, sink and memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import ConfigError, PlanError
from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.streaming import stream_preset, stream_settings

TOKENS = 2


def content(frame):
    """Keys and values of a frame `[1, S, 1, 1]` that say which frame they are."""
    return torch.full((1, TOKENS, 1, 1), float(frame)), torch.full((1, TOKENS, 1, 1), -float(frame))


def put(cache, frames, layer=0):
    k, v = (torch.cat(x, dim=1) for x in zip(*map(content, frames), strict=True))
    gone = cache.make_room(frames)
    cache.write(layer, frames, k, v)
    cache.commit(frames)
    return gone


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(1, 5), st.lists(st.integers(1, 5), min_size=1, max_size=25), st.integers(0, 9))
def test_ring_equals_a_list(sink, ring, chunks, first):
    cache, kept, at = FrameCache(1, sink + ring, sink), [], first
    cache.restart(first)
    for length in chunks:
        frames = range(at, at + min(length, ring))
        gone = put(cache, frames)
        everything = [*kept, *frames]
        anchors, rest = everything[:sink], everything[sink:]
        expected = anchors + rest[-ring:]
        assert gone == [f for f in kept if f not in expected]
        assert cache.kept == expected
        assert cache.visible(frames) == expected
        k, v = cache.read(0, expected)
        assert torch.equal(k[0, ::TOKENS, 0, 0], torch.tensor(expected).float())
        assert torch.equal(v, -k)
        order = cache.in_slot_order(expected)
        assert [cache.slot(f) for f in order] == list(range(len(expected)))
        kept, at = expected, frames.stop


def test_a_full_window_is_read_without_a_copy():
    cache = FrameCache(1, 8, 2)
    for start in range(0, 30, 3):
        put(cache, range(start, start + 3))
    frames = cache.in_slot_order(cache.kept)
    k, _ = cache.read(0, frames)
    assert k.data_ptr() == cache._buffers[0][0].data_ptr()
    assert cache.read(0, [29])[0].data_ptr() != k.data_ptr()


def test_unbounded_cache_grows_and_keeps_everything():
    cache = FrameCache(1, None, 1)
    for start in range(0, 40, 4):
        put(cache, range(start, start + 4))
    assert torch.equal(cache.read(0, cache.kept)[0][0, ::TOKENS, 0, 0], torch.arange(40.0))


@pytest.mark.parametrize(("sink", "decay"), [(3, 0.25), (2, 0.1)])
def test_moving_sink_is_the_weighted_sum_of_what_was_evicted(sink, decay):
    cache, count = FrameCache(1, sink + 3, sink, decay), 30
    for start in range(0, count, 3):
        put(cache, range(start, start + 3))
    for i in range(sink):
        evicted = [f for f in range(sink, count - 3) if (f - sink) % sink == i]
        expected = float(i)
        for frame in evicted:
            expected = (1 - decay) * expected + decay * frame
        got = cache.read(0, [i])[0]
        torch.testing.assert_close(got, torch.full_like(got, expected))
        assert i <= expected <= evicted[-1]


def test_state_round_trip_and_restart():
    cache, other = FrameCache(2, 5, 1), FrameCache(2, 5, 1)
    for layer in (0, 1):
        put(cache, range(3), layer)
    other.load_state_dict(cache.state_dict())
    put(cache, range(3, 6))
    assert other.kept == [0, 1, 2]
    assert torch.equal(other.read(1, [0, 1, 2])[0][0, ::TOKENS, 0, 0], torch.arange(3.0))
    other.restart(6)
    assert other.kept == []
    put(other, range(6, 9))
    assert other.slot(6) == 0
    assert other.bytes == cache.bytes


def test_gaps_and_too_long_chunks_are_refused():
    cache = FrameCache(1, 5, 2)
    with pytest.raises(PlanError, match="nothing has been written"):
        cache.read(0, [0])
    for start in (0, 3, 6):
        put(cache, range(start, start + 3))
    for frames in (range(10, 12), range(5, 7), range(9, 13)):
        with pytest.raises(PlanError, match="at most 3 frames"):
            cache.make_room(frames)


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"chunks": 3}, "stream.chunks: unknown key; did you mean 'chunk'"),
        ({"steps": [500, 750]}, "steps must fall"),
        ({"sink": 3, "window": 5}, "window must hold the sink"),
        ({"sink_decay": 0.1}, "use positions='reindex'"),
        ({"chunk": True}, "stream.chunk"),
        ({"rolling": True, "sampler": "euler", "window": 21}, "rolling needs"),
        ({"antiphase": 1.0}, "stream.antiphase"),
        ({"frequencies": {"low": 2.0}}, "low must be below high"),
    ],
)
def test_settings_are_checked(values, where):
    with pytest.raises(ConfigError, match=where):
        stream_settings(**values)


def test_published_settings_by_name():
    assert stream_preset("longlive").window == 12
    with pytest.raises(ConfigError, match="did you mean 'longlive'"):
        stream_preset("longlife")
