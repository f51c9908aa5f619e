"""A running stream: an iterator over chunks of frames whose prompt can be changed while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.pipelines.streaming.decoder import LatentDecoder
from dit_accel.pipelines.streaming.driver import ChunkDriver, SwitchMode
from dit_accel.pipelines.streaming.finished import Finished
from dit_accel.pipelines.streaming.states import check_origin, load_state, save_state
from dit_accel.report.records import Report
from dit_accel.streaming import BLEND_CHUNKS

OutputType = Literal["np", "pt", "latent"]


@dataclass(frozen=True)
class StreamChunk:
    """A finished piece of video.

    Args:
        index: number of the chunk in the stream, given ones included.
        latent_frames: its latent frames.
        first_frame: number of its first pixel frame in the stream.
        frames: "np": float32 `[T, H, W, 3]` in [0, 1]; "pt": `[T, 3, H, W]` in [0, 1] on the device; "latent": None.
        latents: normalised latents `[1, C, F, h, w]`, fp32.
        given: whether it was handed in as the start and not generated.
        denoise: seconds until its latents were finished.
        decode: seconds that decoding took; 0 when decoding ran beside denoising on a second CUDA stream.
    """

    index: int
    latent_frames: range
    first_frame: int
    frames: Any
    latents: Tensor
    given: bool
    denoise: float
    decode: float


class VideoStream(Iterator[StreamChunk]):
    """Yields chunks as they are made. Memory does not grow; a stream that is dropped leaves nothing behind.

    Args:
        driver: makes latents.
        decoder: turns them into frames; None for latents only.
        encode: turns a prompt into embeddings `[1, L, C]`.
        output_type: see `StreamChunk.frames`.
        start: latents `[1, C, F, h, w]` that begin the video.
        overlap: on CUDA, decode on a second stream while the finished chunk is written to the caches.
    """

    def __init__(
        self,
        driver: ChunkDriver,
        decoder: LatentDecoder | None,
        encode: Callable[[str], Tensor],
        output_type: OutputType = "np",
        start: Tensor | None = None,
        overlap: bool = False,
    ) -> None:
        self.driver, self.decoder, self.output_type = driver, decoder, output_type
        self._encode = encode
        self._side = torch.cuda.Stream() if overlap and driver.device.type == "cuda" else None
        self._switch: tuple[str, SwitchMode, int] | None = None
        self._ready = [] if start is None else [(chunk, True) for chunk in driver.give(start)]
        self._decoded: Tensor | None = None  # of the first chunk that is ready: its decoder has moved on
        self._index = 0
        self._frame = 0

    def __next__(self) -> StreamChunk:
        begun = self._now()
        if not self._ready:
            self._apply_switch()
            if (made := self.driver.next()) is None:
                raise StopIteration
            self._ready.append((made, False))
        denoised = self._now()
        chunk, given = self._ready[0]
        frames = self._decode(chunk)
        self._ready.pop(0)
        self._decoded = None
        done = self._now()
        count = 0 if frames is None else len(frames)
        index, first = self._index, self._frame
        self._index, self._frame = index + 1, first + count
        return StreamChunk(index, chunk.frames, first, frames, chunk.latents, given, denoised - begun, done - denoised)

    def _now(self) -> float:
        """Seconds; waits for the device unless decoding overlaps, where waiting would undo it."""
        if self.driver.device.type == "cuda" and self._side is None:
            torch.cuda.synchronize(self.driver.device)
        return time.perf_counter()

    def _decode(self, chunk: Finished) -> Any:
        if self.decoder is None:
            return None
        frames = self._decoded
        if self._side is None:
            self._decoded = frames = self.decoder.decode(chunk.latents) if frames is None else frames
        else:
            main = torch.cuda.current_stream()
            self._side.wait_stream(main)
            with torch.cuda.stream(self._side):
                self._decoded = frames = self.decoder.decode(chunk.latents) if frames is None else frames
            chunk.latents.record_stream(self._side)
            if self.driver.chunks is None or self.driver.made < self.driver.chunks:
                self.driver.flush()
            main.wait_stream(self._side)
            frames.record_stream(main)
        frames = (frames[0].transpose(0, 1).float() / 2 + 0.5).clamp(0, 1)
        return frames if self.output_type == "pt" else frames.permute(0, 2, 3, 1).cpu().numpy()

    def set_prompt(self, text: str, mode: SwitchMode = "recache", over: int | None = None) -> None:
        """Change the prompt from the next chunk on. Of several calls before a chunk the last one counts.

        Args:
            text: the new prompt.
            mode: "recache" (smooth, takes effect at once), "blend" (over `over` chunks), "cut" (new scene) or "keep"
                (the text alone changes); see `ChunkDriver.switch`.
            over: chunks of a blend, at least 2. Default 4; 1 for the other modes.

        Raises:
            ConfigError: unknown mode, or `over` that it does not take.
        """
        if mode not in get_args(SwitchMode):
            raise ConfigError("mode", f"expected one of {', '.join(get_args(SwitchMode))}, got {mode!r}")
        chosen = over if over is not None else BLEND_CHUNKS if mode == "blend" else 1
        if chosen < 1 or (chosen > 1) != (mode == "blend"):
            raise ConfigError("over", f"expected 2 or more for mode='blend', else 1, got {over} with mode={mode!r}")
        self._switch = (text, mode, chosen)

    def _apply_switch(self) -> None:
        if self._switch is not None:
            text, mode, over = self._switch
            self.driver.switch(self._encode(text), mode, over)
            self._switch = None

    def finish(self) -> None:
        """Begin no new chunk: the iterator ends after those in flight (there are some in a rolling window only)."""
        self.driver.chunks = self.driver.made + len(getattr(self.driver, "flight", ()))

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, text and what the attention policy holds."""
        return self.driver.bytes

    def report(self) -> Report:
        """The attention calls of the chunk that was finished last; `chunk_sums` says what those before came to."""
        attention = self.driver.settings.attention
        policy = self.driver.branches[0].policy
        parameters = attention.parameters if policy.name == attention.name else {}
        return self.driver.calls.report({"method": policy.name, "parameters": parameters})

    @property
    def chunk_sums(self) -> list[dict[str, Any]]:
        """What the calls of each chunk came to; see `StreamCalls.chunks`."""
        return self.driver.calls.chunks

    @property
    def _origin(self) -> dict[str, Any]:
        return {"decoder": None if self.decoder is None else type(self.decoder).__name__}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on in another process, at a chunk boundary; copies of tensors."""
        return {
            "origin": self._origin,
            "driver": self.driver.state_dict(),
            "decoder": None if self.decoder is None else self.decoder.state_dict(),
            "ready": [(chunk.state_dict(), given) for chunk, given in self._ready],
            "switch": self._switch,
            "index": self._index,
            "frame": self._frame,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()` of a stream with the same model, settings, size and decoder; the prompt is in it.

        Raises:
            ConfigError: they differ; this stream stays as it is.
        """
        check_origin(state.get("origin"), self._origin)
        self.driver.load_state_dict(state["driver"])
        if self.decoder is not None:
            self.decoder.load_state_dict(state["decoder"])
        self._ready = [(Finished(**chunk), given) for chunk, given in state["ready"]]
        self._decoded = None
        self._index, self._frame, self._switch = state["index"], state["frame"], state["switch"]
        self.driver.calls.begin_at(self._index + len(self._ready))

    def save(self, path: str | Path) -> None:
        """Write `state_dict()` as safetensors."""
        save_state(self.state_dict(), path)

    def load(self, path: str | Path) -> None:
        """Go on from a file of `save`.

        Raises:
            ConfigError: no such file, or one of a stream that differs, see `load_state_dict`.
        """
        self.load_state_dict(load_state(path, self.driver.device))


def join_frames(chunks: list[StreamChunk]) -> np.ndarray:
    """The frames of "np" chunks as one video `[T, H, W, 3]`."""
    return np.concatenate([chunk.frames for chunk in chunks])
