"""Streams of the demo without a page: prompts that change on the way, history, replay, bad input."""

from __future__ import annotations

import pytest

from dit_accel.errors import ConfigError
from dit_accel.pipelines.demo.jobs import Cancelled, Studio
from dit_accel.pipelines.demo.streams import Change, History, Streamer
from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.pipelines.streaming.stream import join_frames
from dit_accel.video.files import OutputFile

SETTINGS = {"steps": [1000.0, 500.0], "chunk": 2, "window": 4, "sink": 1, "positions": "reindex"}


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio("tiny-wan", tmp_path_factory.mktemp("stream"), device="cpu")


def short(chunks=4, prompt="a red ball moving right"):
    return History(seed=3, height=32, width=32, chunks=chunks, changes=[Change(0, prompt)])


def test_a_prompt_said_on_the_way_takes_effect_at_the_next_chunk_and_replays(studio):
    streamer, grown = Streamer(studio), []
    for event in streamer.run(short(), 10, SETTINGS):
        grown.append(event)
        if event.chunk == 1:
            streamer.say("a blue square moving left", "cut")
    assert [event.prompt for event in grown] == ["a red ball moving right"] * 2 + ["a blue square moving left"] * 2
    frames = [event.frames for event in grown]
    assert frames == sorted(frames)
    assert grown[-1].first_latency > 0
    assert list(studio.output_dir.glob("*stream*.mp4")) == [grown[-1].path]
    history = History.from_json(streamer.history.to_json())
    assert history.changes == [Change(0, "a red ball moving right"), Change(2, "a blue square moving left", "cut")]
    video = grown[-1].path.read_bytes()
    replayed = list(Streamer(studio).run(history, 10, SETTINGS))
    assert replayed[-1].path.read_bytes() == video
    assert not studio.is_busy


def test_a_stream_of_the_page_is_that_of_the_preset(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        "extends: tiny-wan-causal\ngeneration: {negative_prompt: a blue square}\nstream: {guidance_scale: 3}\n"
    )
    studio = Studio(str(path), tmp_path, device="cpu")
    (*_, last) = Streamer(studio).run(short(chunks=2), 10)
    pipe = StreamingWanPipeline.from_preset(path, device="cpu")
    frames = join_frames(list(pipe.stream("a red ball moving right", seed=3, num_chunks=2, height=32, width=32)))
    with OutputFile(tmp_path / "expected.mp4") as file:
        file.write(frames, 10)
    assert last.path.read_bytes() == (tmp_path / "expected.mp4").read_bytes()


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        (
            "extends: tiny-wan-causal\nextras: {layerwise_casting: {}}\n",
            r"extras\.layerwise_casting: streams do without",
        ),
        ("extends: flux1-dev\n", "is flux t2i; streams need wan t2v"),
    ],
)
def test_a_preset_that_cannot_stream_is_refused_before_its_model_is_loaded(tmp_path, monkeypatch, preset, message):
    path = tmp_path / "mine.yaml"
    path.write_text(preset)
    studio = Studio(str(path), tmp_path, device="cpu")
    monkeypatch.setattr(studio, "load", lambda: pytest.fail("a model was loaded"))
    with pytest.raises(ConfigError, match=message):
        next(Streamer(studio).run(short(), 10))
    assert not studio.is_busy


def test_a_prompt_said_while_the_model_loads_changes_the_second_chunk(studio, monkeypatch):
    streamer, load = Streamer(studio), studio.load
    assert not streamer.say("nobody hears this", "cut")

    def slowly():
        assert streamer.say("a blue square", "cut")
        return load()

    monkeypatch.setattr(studio, "load", slowly)
    grown = list(streamer.run(short(chunks=3), 10, SETTINGS))
    assert [event.prompt for event in grown] == ["a red ball moving right", "a blue square", "a blue square"]
    assert streamer.history.changes[1:] == [Change(1, "a blue square", "cut")]


def test_a_prompt_after_the_last_chunk_began_is_not_taken(studio):
    streamer = Streamer(studio)
    taken = [streamer.say("a blue square", "cut") for _ in streamer.run(short(chunks=3), 10, SETTINGS)]
    assert taken == [True, True, False]
    with studio.job():
        assert not streamer.say("a blue square", "cut")


def test_streams_are_made_with_the_causal_sibling_and_never_beside_another_job(studio):
    streams = studio.for_streams()
    assert (streams.preset.name, streams.for_streams()) == ("tiny-wan-causal", streams)
    with studio.job():
        assert streams.is_busy
        assert streams.cancel()
        assert studio.is_stopping
    own = Studio("tiny-wan", studio.output_dir, device="cpu", model="somewhere")
    assert own.for_streams() is own


def test_cancelling_and_size_errors_free_the_studio(studio):
    streamer = Streamer(studio)
    job = streamer.run(short(chunks=100), 10, SETTINGS)
    next(job)
    assert studio.cancel()
    with pytest.raises(Cancelled):
        list(job)
    with pytest.raises(ConfigError, match="height"):
        list(streamer.run(History(0, 33, 32, 2, [Change(0, "a ball")]), 10, SETTINGS))
    with pytest.raises(ConfigError, match="chunks"):
        list(streamer.run(short(chunks=0), 10, SETTINGS))
    assert not studio.is_busy


def test_the_history_of_a_stream_that_was_stopped_is_that_of_its_chunks():
    whole = History(3, 32, 48, 9, [Change(0, "a"), Change(2, "b", "blend"), Change(5, "c")])
    assert whole.up_to(5) == History(3, 32, 48, 5, [Change(0, "a"), Change(2, "b", "blend")])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"seed": 0}',
        '{"seed": true, "height": 32, "width": 32, "chunks": 1, "changes": [{"chunk": 0, "prompt": "x"}]}',
        '{"seed": 0, "height": 32, "width": 32, "chunks": 1, "changes": []}',
        '{"seed": 0, "height": 32, "width": 32, "chunks": 1, "changes": [{"chunk": 0, "prompt": " "}]}',
        '{"seed": 0, "height": 32, "width": 32, "chunks": 1, "changes": [{"chunk": 0, "prompt": "x", "mode": "fade"}]}',
    ],
)
def test_a_history_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="history"):
        History.from_json(text)
