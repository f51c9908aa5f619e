"""Streams of the demo: a video that grows chunk by chunk, prompts that change on the way, and a history to replay."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.pipelines.demo.jobs import Cancelled, Studio
from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.pipelines.streaming.pipeline import check_preset
from dit_accel.presets import Preset
from dit_accel.streaming import StreamSettings
from dit_accel.video.files import OutputFile, check_frames, to_uint8

MOST_CHUNKS = 200
_MODES = ("cut", "recache", "blend", "keep")


@dataclass(frozen=True)
class Change:
    """A prompt that takes effect at a chunk.

    Args:
        chunk: number of the chunk, from 0.
        prompt: the text.
        mode: "cut", "recache", "blend" or "keep".
    """

    chunk: int
    prompt: str
    mode: str = "cut"

    def __post_init__(self) -> None:
        if not isinstance(self.chunk, int) or isinstance(self.chunk, bool) or self.chunk < 0:
            raise ConfigError("history.chunk", f"expected an integer of at least 0, got {self.chunk!r}")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("history.prompt", f"expected a text, got {self.prompt!r}")
        if self.mode not in _MODES:
            raise ConfigError("history.mode", f"expected one of {', '.join(_MODES)}, got {self.mode!r}")


@dataclass
class History:
    """What made a stream; the same history gives the same stream again.

    Args:
        seed: of the noise.
        height, width: pixels.
        chunks: how many.
        changes: the prompts, the first at chunk 0.
    """

    seed: int
    height: int
    width: int
    chunks: int
    changes: list[Change] = field(default_factory=list)

    def up_to(self, chunks: int) -> History:
        """The history of the first `chunks` alone, for a stream that was stopped."""
        kept = [change for change in self.changes if change.chunk < chunks]
        return History(self.seed, self.height, self.width, chunks, kept)

    def to_json(self) -> str:
        """As text; `from_json` reads it."""
        return json.dumps({**vars(self), "changes": [vars(change) for change in self.changes]}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> History:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: not such a text; names what was expected.
        """
        try:
            values = json.loads(text)
            changes = [Change(**change) for change in values.pop("changes")]
            history = cls(**values, changes=changes)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError("history", f"expected a history saved by this page: {error}") from None
        numbers = (history.seed, history.height, history.width, history.chunks)
        if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers) or not changes:
            raise ConfigError("history", f"expected whole numbers and at least one prompt, got {values}")
        return history


@dataclass(frozen=True)
class Grown:
    """A chunk more.

    Args:
        path: the video so far.
        chunk: number of the chunk, from 0.
        frames: pixel frames so far.
        denoise_fps, total_fps: frames of this chunk per second of denoising, and of the whole stream so far.
        first_latency: seconds until the first frame.
        prompt: the prompt of this chunk.
    """

    path: Path
    chunk: int
    frames: int
    denoise_fps: float
    total_fps: float
    first_latency: float
    prompt: str


class Streamer:
    """Streams on the pipeline of a `Studio`, one stream at a time, and takes new prompts while it runs."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        self.history: History | None = None
        self._is_open = False
        self._waiting: Change | None = None
        self._lock = threading.Lock()

    def say(self, prompt: str, mode: str) -> bool:
        """Change the prompt at the next chunk; of several calls before a chunk the last one counts.

        One that is said before the first chunk, while the model loads, changes the second.

        Returns:
            Whether a stream is running that has a next chunk; else nothing is changed.

        Raises:
            ConfigError: an empty prompt or an unknown mode.
        """
        change = Change(0, prompt, mode)
        with self._lock:
            self._waiting = change if self._is_open else None
            return self._is_open

    def run(
        self, history: History, fps: int, settings: StreamSettings | Mapping[str, Any] | None = None
    ) -> Iterator[Grown]:
        """Stream what `history` says; prompts that `say` brings are added to it.

        Args:
            history: seed, size, number of chunks, prompts.
            fps: of the written video.
            settings: of the stream, or the values that differ from the preset's. Default: the preset's.

        Raises:
            RuntimeError: another job is running.
            Cancelled: it was stopped.
            ConfigError: a size the model cannot make, or a preset that cannot stream.
        """
        check_preset(self.studio.preset)
        if not 1 <= history.chunks <= MOST_CHUNKS:
            raise ConfigError("chunks", f"expected 1 to {MOST_CHUNKS}, got {history.chunks}")
        with self.studio.job():
            self.history = history
            self._open(history.chunks > 1)
            try:
                streaming = _streaming_pipeline(self.studio.load(), self.studio.preset)
                yield from self._stream(streaming, history, fps, settings)
            finally:
                self._open(False)

    def _open(self, is_open: bool) -> None:
        """Begin or end to take prompts."""
        with self._lock:
            self._is_open, self._waiting = is_open, None

    def _stream(
        self, streaming: Any, history: History, fps: int, settings: StreamSettings | Mapping[str, Any] | None
    ) -> Iterator[Grown]:
        planned = {change.chunk: change for change in history.changes}
        try:
            stream = streaming.stream(
                planned[min(planned)].prompt,
                seed=history.seed,
                num_chunks=history.chunks,
                height=history.height,
                width=history.width,
                settings=settings,
            )
            yield from self._follow(stream, history, planned, fps)
        finally:
            streaming.end_streams()

    def _follow(self, stream: Any, history: History, planned: dict[int, Change], fps: int) -> Iterator[Grown]:
        pieces: list[np.ndarray] = []
        begun, first, last, prompt = time.perf_counter(), 0.0, None, planned[min(planned)].prompt
        name = f"{time.strftime('%Y%m%d-%H%M%S')}-stream-seed{history.seed}"
        for number in range(history.chunks):
            if self.studio.is_stopping:
                raise Cancelled("stopped")
            change = self._next_change(number, planned, history)
            if change is not None:
                stream.set_prompt(change.prompt, change.mode)
                prompt = change.prompt
            chunk = next(stream)
            first = first or time.perf_counter() - begun
            check_frames(chunk.frames)
            pieces.append(to_uint8(chunk.frames))
            path = self.studio.output_dir / f"{name}-{number:04d}.mp4"
            with OutputFile(path) as file:
                file.write(np.concatenate(pieces), fps)
            if last is not None:
                last.unlink(missing_ok=True)  # the longer video holds it
            last = path
            frames = sum(len(piece) for piece in pieces)
            spent = time.perf_counter() - begun
            yield Grown(path, number, frames, len(pieces[-1]) / chunk.denoise, frames / spent, first, prompt)

    def _next_change(self, number: int, planned: dict[int, Change], history: History) -> Change | None:
        """The prompt that starts at this chunk: the last one said, else the planned one."""
        if number == 0:  # what was said while the model loaded waits for the next
            return None
        with self._lock:
            said, self._waiting = self._waiting, None
            self._is_open = number + 1 < history.chunks
        if said is not None:
            change = Change(number, said.prompt, said.mode)
            history.changes = [c for c in history.changes if c.chunk != number] + [change]
            return change
        return planned.get(number)


def _streaming_pipeline(pipe: Any, preset: Preset) -> Any:
    """What `StreamingWanPipeline.from_preset` gives for `preset`, around the components that are loaded."""
    streaming = StreamingWanPipeline(**pipe.components)
    streaming.preset, streaming.stream_settings = preset, preset.stream
    return streaming
