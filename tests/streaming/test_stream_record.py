"""What a stream of the command leaves: typed prompts, images that it begins with, and the report of one that failed."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from stream_cases import frames_of

from dit_accel.pipelines.streaming.stream import VideoStream
from dit_accel.video.growing import StreamingVideoFile

WORDS = ("--prompt", "a red ball", "--output", "o.mp4")


def report_of(folder):
    return json.loads((folder / "o.json").read_text())


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "first.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 24, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    ("typed", "last", "over"),
    [("", "a red ball", 1), ("\ncut: blue\n", "blue", 1), ("blue\nblend: green\n", "green", 4)],
)
def test_the_end_of_the_typed_prompts_ends_the_stream_when_the_last_one_holds(
    command, tmp_path, monkeypatch, typed, last, over
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    code, _, err = command(*WORDS, "--live")
    assert code == 0, err
    report = report_of(tmp_path)
    assert report["prompts"][-1]["prompt"] == last
    assert report["prompts"][-1]["over"] == over
    assert len(report["chunks"]) >= report["prompts"][-1]["chunk"] + over - 1
    assert len(report["denoise_s"]) == len(report["chunks"])


def test_planned_prompts_are_shown_though_nothing_is_typed(command, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    (tmp_path / "p.yaml").write_text("- {prompt: red}\n- {prompt: blue, chunk: 3}\n")
    code, _, err = command("--output", "o.mp4", "--live", "--prompts-file", "p.yaml")
    assert code == 0, err
    assert [x["prompt"] for x in report_of(tmp_path)["prompts"]] == ["red", "blue"]
    assert len(frames_of(tmp_path / "o.mp4")) == 3 + 4 + 4


@pytest.mark.parametrize(
    ("length", "frames"), [(["--num-frames", 9], 9), (["--num-frames", 8], 9), (["--num-chunks", 3], 9)]
)
def test_an_image_is_the_first_chunk_of_a_stream(command, tmp_path, image, length, frames):
    (tmp_path / "p.yaml").write_text("- {prompt: red}\n- {prompt: blue, chunk: 3}\n")
    code, _, err = command("--output", "o.mp4", "--image", image, "--prompts-file", "p.yaml", *length)
    assert code == 0, err
    assert len(frames_of(tmp_path / "o.mp4")) == frames
    assert [x["chunk"] for x in report_of(tmp_path)["prompts"]] == [1, 3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num-chunks", 1, "--image", "first.png"], "--num-chunks: expected at least 2, since the image is"),
        (["--num-chunks", 400], "expected at most 128 latent frames in a scene"),
        (["--num-frames", 4000], "expected at most 128 latent frames in a scene"),
    ],
)
def test_lengths_that_cannot_be_made_are_refused_before_the_first_chunk(
    command, tmp_path, image, monkeypatch, words, message
):
    monkeypatch.setattr(VideoStream, "__next__", lambda _: pytest.fail("a chunk was made"))
    code, _, err = command(*WORDS, *words)
    assert (code, message in err) == (2, True), err
    assert not (tmp_path / "o.mp4").exists()


class Broken(VideoStream):
    """Fails, or makes NaN, at its third chunk."""

    error: BaseException | None = None

    def __next__(self):
        chunk = super().__next__()
        if chunk.index == 2:
            if self.error is not None:
                raise self.error
            chunk.frames[0, 0, 0] = np.nan
        return chunk


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 1, "frames hold NaN or infinite numbers, so they were not written; try --method dense"),
        (RuntimeError("out of memory"), 1, "out of memory"),
        (KeyboardInterrupt(), 0, None),
    ],
)
def test_a_stream_that_fails_leaves_its_chunks_and_its_report(command, tmp_path, monkeypatch, error, code, message):
    monkeypatch.setattr(Broken, "error", error)
    monkeypatch.setattr("dit_accel.pipelines.streaming.pipeline.VideoStream", Broken)
    left, _, err = command(*WORDS, "--num-chunks", 4)
    assert left == code
    assert len(frames_of(tmp_path / "o.mp4")) == 7
    report = report_of(tmp_path)
    assert len(report["denoise_s"]) == 2
    if message is None:
        assert "error" not in report
    else:
        assert message in err
        assert message in report["error"]


def test_an_encoder_that_fails_at_the_end_leaves_the_report(command, tmp_path, monkeypatch):
    def fail(_):
        raise OSError("the disk is full")

    monkeypatch.setattr(StreamingVideoFile, "close", fail)
    code, _, err = command(*WORDS, "--num-chunks", 2)
    assert (code, "the disk is full" in err) == (1, True)
    assert len(report_of(tmp_path)["denoise_s"]) == 2


def test_a_stream_whose_first_chunk_fails_leaves_nothing(command, tmp_path, monkeypatch):
    def fail(_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(VideoStream, "__next__", fail)
    code, _, err = command(*WORDS, "--num-chunks", 4)
    assert (code, "out of memory" in err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["stream.yaml"]
