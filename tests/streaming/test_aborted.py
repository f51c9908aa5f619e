"""A pass that fails once: the stream goes on as if it had not."""

from __future__ import annotations

import pytest
import torch
from stream_cases import FRAME, text, tiny_transformer

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.rolling import make_driver
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.pipelines.streaming.stream import VideoStream
from dit_accel.streaming import StreamSettings

SHORT = {"steps": (1000.0, 500.0), "chunk": 2, "window": 6, "sink": 2, "positions": "reindex"}
TEXTS = {"red": text(), "blue": text(1)}
CHUNKS = 5


class Interrupted(Exception):
    """What a broken pass raises."""


@pytest.fixture(scope="module")
def model():
    return tiny_transformer(layers=2, heads=1, head_dim=12)


def begin(model, policy=DenseContext, **changes):
    settings = StreamSettings(**{**SHORT, **changes})
    negative = text(5) if settings.guidance_scale > 1 else None
    driver = make_driver(CausalWan(model), settings, TEXTS["red"], FRAME, negative=negative, policy=policy)
    return VideoStream(driver, None, TEXTS.get, "latent")


def run(model, mode, broken=None, **changes):
    """Latents of all chunks, and the number of passes that ran, of which `broken` raises in its last block."""
    stream, made, passes = begin(model, **changes), [], 0

    def count(*_):
        nonlocal passes
        passes += 1
        if passes - 1 == broken:
            raise Interrupted

    def go_on_to(chunks):
        while len(made) < chunks:
            try:
                made.append(next(stream).latents)
            except Interrupted:
                continue

    hook = model.blocks[-1].register_forward_pre_hook(count)
    try:
        go_on_to(CHUNKS - 2)
        stream.set_prompt("blue", mode, over=2 if mode == "blend" else 1)
        go_on_to(CHUNKS)
    finally:
        hook.remove()
        stream.driver.runtime.close()
    return torch.cat(made, 2), passes


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("recache", {"sink_decay": 0.1}),
        ("blend", {"steps": (1000.0,), "guidance_scale": 2.0, "keep_sink": False, "recache": "causal"}),
        ("cut", {"antiphase": 0.3}),
        ("blend", {"policy": lambda: CompressedMemory((1, 2))}),
        ("keep", {"steps": (1000.0,), "policy": lambda: LightForcing(block=2, top_frames=2)}),
        ("recache", {"rolling": True, "positions": "sink_adjacent", "antiphase": 0.3, "guidance_scale": 2.0}),
    ],
)
def test_every_pass_may_fail_once(model, mode, changes):
    undisturbed, passes = run(model, mode, **changes)
    for broken in range(passes):
        made, more = run(model, mode, broken, **changes)
        torch.testing.assert_close(made, undisturbed, atol=1e-5, rtol=1e-5, msg=f"pass {broken}")
        assert more > passes


class Failing:
    """A decoder without state that fails on its second call."""

    calls = 0

    def decode(self, latents):
        self.calls += 1
        if self.calls == 2:
            raise Interrupted
        return latents[:, :3] / 8


def test_frames_that_could_not_be_fetched_are_not_decoded_again(model, monkeypatch):
    class Counting:
        calls = 0

        def decode(self, latents):
            self.calls += 1
            return latents[:, :3] / 8

    stream, fetch, fetched = begin(model), torch.Tensor.cpu, []
    stream.decoder, stream.output_type = Counting(), "np"

    def fail_once(tensor):
        fetched.append(1)
        if len(fetched) == 2:
            raise Interrupted
        return fetch(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", fail_once)
    chunks = [next(stream)]
    with pytest.raises(Interrupted):
        next(stream)
    chunks += [next(stream), next(stream)]
    stream.driver.runtime.close()
    assert stream.decoder.calls == 3
    assert [chunk.first_frame for chunk in chunks] == [0, 2, 4]


def test_a_chunk_whose_decoding_fails_is_decoded_again(model):
    stream = begin(model)
    stream.decoder, stream.output_type = Failing(), "pt"
    chunks = [next(stream)]
    with pytest.raises(Interrupted):
        next(stream)
    chunks += [next(stream), next(stream)]
    stream.driver.runtime.close()
    undisturbed = run(model, "keep")[0][0, :3, :6].transpose(0, 1)
    assert torch.equal(torch.cat([chunk.frames for chunk in chunks]), (undisturbed / 8 / 2 + 0.5).clamp(0, 1))
    assert [chunk.first_frame for chunk in chunks] == [0, 2, 4]


def test_a_stream_whose_processors_were_taken_away_says_so(model):
    stream = begin(model)
    next(stream)
    stream.driver.runtime.close()
    with pytest.raises(UnsupportedError, match="the stream has ended"):
        next(stream)
