"""What a stream leaves: the file that grows with every chunk, the prompts on the way, and the report at its end."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.batch import reason_of
from dit_accel.cli.app import console
from dit_accel.cli.files import write_json
from dit_accel.cli.prompts import LivePrompts, PromptChange
from dit_accel.presets import Preset
from dit_accel.streaming import StreamSettings
from dit_accel.video.files import check_frames
from dit_accel.video.growing import StreamingVideoFile

_REMEDIES = "--method dense, then --dtype bfloat16 or float32"


@dataclass(frozen=True)
class StreamRequest:
    """What a stream is made from.

    Args:
        preset: of the model.
        settings: of the stream.
        changes: its prompts, the first at chunk 1.
        output, report: files to write.
        chunks: how many, an image that it begins with among them; None: endless.
        options: of the command line, by name.
    """

    preset: Preset
    settings: StreamSettings
    changes: list[PromptChange]
    output: Path
    report: Path
    chunks: int | None
    options: Mapping[str, Any]

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.options["height"] or self.preset.generation.height)

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.options["width"] or self.preset.generation.width)

    @property
    def fps(self) -> int:
        """Frames per second of the file."""
        return int(self.options["fps"] or self.preset.generation.fps or 16)

    @property
    def has_image(self) -> bool:
        """Whether the first chunk is an image and not made."""
        return self.options["image"] is not None


class StreamRecord:
    """Writes the chunks of a stream, changes its prompts, and keeps the times.

    Args:
        request: what was asked for.
        stream: the `VideoStream`.
        file: receives the frames.
        begun: when the stream was begun, by `time.perf_counter`.
    """

    def __init__(self, request: StreamRequest, stream: Any, file: StreamingVideoFile, begun: float) -> None:
        self.request, self.stream, self.file, self.begun = request, stream, file, begun
        self.denoise: list[float] = []
        self.decode: list[float] = []
        self.frames: list[int] = []
        self.latency = 0.0
        self.prompts = [request.changes[0].model_dump()]
        self._planned = {change.chunk: change for change in request.changes[1:]}
        self._settled = 0  # index of the chunk from which the latest prompt holds alone

    def follow(self, live: LivePrompts | None) -> None:
        """Until the stream ends, or the typed input does; an interrupt ends the video where it is.

        Args:
            live: prompts that are typed meanwhile. None: there are none.

        Raises:
            UnsupportedError: frames that are no picture (NaN). The report of what was made before is written first, as
                it is for any other error.
        """
        error: BaseException | None = None
        try:
            for chunk in self.stream:
                self._keep(chunk)
                if (change := self._change_after(chunk.index, live)) is not None:
                    self._apply(change, chunk.index)
        except KeyboardInterrupt:
            console.print("interrupted; the video ends here")
        except BaseException as failure:
            error = failure
            raise
        finally:
            self._finish(error)

    def _keep(self, chunk: Any) -> None:
        """Write the frames of a chunk and note its times."""
        check_frames(chunk.frames, _REMEDIES)
        self.file.write(chunk.frames)
        self.latency = self.latency or time.perf_counter() - self.begun
        self.denoise.append(chunk.denoise)
        self.decode.append(chunk.decode)
        self.frames.append(len(chunk.frames))
        console.print(
            f"chunk {chunk.index + 1}: {self.file.frames / self.request.fps:.1f} s of video, "
            f"denoise {chunk.denoise:.2f} s, decode {chunk.decode:.2f} s"
        )

    def _change_after(self, index: int, live: LivePrompts | None) -> PromptChange | None:
        """The prompt that the next chunk begins with, typed or planned; ends a stream that has nothing to wait for."""
        change = self._planned.pop(index + 2, None)
        if live is None:
            return change
        state = live.look()
        change = state.change or change
        is_settled = change is None and not self._planned and index >= self._settled
        if state.ended and is_settled and self.request.chunks is None:
            self.stream.finish()
        return change

    def _apply(self, change: PromptChange, index: int) -> None:
        self.stream.set_prompt(change.prompt, change.mode, change.over)
        self._settled = index + change.over
        self.prompts.append({**change.model_dump(), "chunk": index + 2})
        console.print(f"prompt from chunk {index + 2}: {change.prompt} ({change.mode})", markup=False)

    def _finish(self, error: BaseException | None) -> None:
        """Close the video and write the report, also where the encoder fails as it is closed."""
        total = time.perf_counter() - self.begun
        try:
            self.file.close()
        finally:
            if self.frames:
                self._report(total, error)

    def _report(self, total: float, error: BaseException | None) -> None:
        """Rates, times and calls, with the error where one ended the stream.

        Args:
            total: seconds from the beginning to the end.
            error: what ended the stream early.
        """
        rates = {
            "denoise_fps": sum(self.frames) / max(sum(self.denoise), 1e-9),
            "end_to_end_fps": sum(self.frames) / total,
            "first_frame_latency_s": self.latency,
            "cache_bytes": self.stream.cache_bytes,
        }
        console.print(
            f"denoising {rates['denoise_fps']:.2f} fps, end to end {rates['end_to_end_fps']:.2f} fps, "
            f"first frame after {self.latency:.2f} s, caches {rates['cache_bytes'] / 2**20:.1f} MiB"
        )
        times = {**rates, "denoise_s": self.denoise, "decode_s": self.decode}
        calls = {"chunks": self.stream.chunk_sums, **self.stream.report().to_dict()}
        failed = {} if error is None else {"error": reason_of(error)}
        self._write_report({**failed, **times, **calls})
        console.print(f"video: {self.request.output}\nreport: {self.request.report}", markup=False)

    def _write_report(self, measured: dict[str, Any]) -> None:
        request = self.request
        content = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
            "preset": request.preset.model_dump(mode="json"),
            "stream": request.settings.model_dump(mode="json"),
            "prompts": self.prompts,
            "seed": request.options["seed"],
            "size": [request.height, request.width],
            "fps": request.fps,
            **measured,
        }
        write_json(request.report, content)
