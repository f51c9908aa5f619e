"""Keys and values of finished frames: a sink that stays and a ring that rolls, with no copy at an eviction.

Axis legend: B batch, S tokens per frame, H heads, D head size. Frames count from the start of the stream, scenes begin
at `origin`. All indices are Python integers, so that nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import PlanError

Evict = Callable[[int, int, Tensor, Tensor], None]


class FrameCache:
    """Keys and values `[B, S, H, D]` per layer and frame.

    Frame f of a scene lies in slot f - origin while that is below `sink`, else in slot
    sink + (f - origin - sink) mod (window - sink): the slots of a chunk are those of the frames that no later chunk
    may see, so the chunk is written in place and an aborted pass leaves everything visible as it was.

    Args:
        layers: attention layers of the transformer.
        window: frames kept, sink included. None: all; the buffers double when they are full.
        sink: leading frames of a scene that are never evicted.
        sink_decay: share of a sink frame that an evicted frame replaces. Default 0: the sink never changes.
    """

    def __init__(self, layers: int, window: int | None, sink: int = 0, sink_decay: float = 0.0) -> None:
        self.layers, self.window, self.sink, self.sink_decay = layers, window, sink, sink_decay
        self.origin = 0
        self.end = 0
        self.oldest = 0
        self._frame_tokens = 0
        self._buffers: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def slot(self, frame: int) -> int:
        """Slot of a frame of this scene."""
        place = frame - self.origin
        if self.window is None or place < self.sink:
            return place
        return self.sink + (place - self.sink) % (self.window - self.sink)

    @property
    def ring_start(self) -> int:
        """First frame of the scene that is not in the sink."""
        return self.origin + self.sink

    @property
    def kept(self) -> list[int]:
        """Frames in the cache, ascending."""
        sink = range(self.origin, min(self.ring_start, self.end))
        return [*sink, *range(max(self.ring_start, self.oldest), self.end)]

    def visible(self, frames: range) -> list[int]:
        """Frames that a pass over `frames` attends, its own included: the sink and the last of the window."""
        first = self.ring_start
        if self.window is not None:
            first = max(first, frames.stop - (self.window - self.sink))
        past = [f for f in self.kept if f < frames.start and (f < self.ring_start or f >= first)]
        return [*past, *frames]

    def make_room(self, frames: range, on_evict: Evict | None = None) -> list[int]:
        """Evict what a chunk of `frames` pushes out of the window, and say which frames these were.

        Args:
            frames: the chunk; it must follow, or repeat, what is kept.
            on_evict: called as (layer, frame, keys, values) for every frame that goes, before its slot is reused.

        Raises:
            PlanError: the chunk leaves a gap, is longer than the window, or begins before what is kept.
        """
        self._check(frames)
        if self.window is None:
            return []
        oldest = max(self.oldest, self.ring_start, frames.stop - (self.window - self.sink))
        gone = list(range(max(self.oldest, self.ring_start), min(oldest, self.end)))
        for frame in gone:
            for layer in range(self.layers):
                k, v = self.read(layer, [frame])
                if self.sink_decay:
                    self._absorb(layer, frame, k, v)
                if on_evict is not None:
                    on_evict(layer, frame, k, v)
        self.oldest = oldest
        return gone

    def _absorb(self, layer: int, frame: int, k: Tensor, v: Tensor) -> None:
        """Move the sink a little towards an evicted frame (arXiv 2512.04678); frame i goes to sink frame i mod sink."""
        if not self.sink:
            return
        target = self.origin + (frame - self.ring_start) % self.sink
        for old, new in zip(self.read(layer, [target]), (k, v), strict=True):
            old.lerp_(new, self.sink_decay)

    def _check(self, frames: range) -> None:
        lowest = self.origin if self.oldest <= self.ring_start else self.oldest
        room = None if self.window is None else self.window - (self.sink if frames.start >= self.ring_start else 0)
        if not lowest <= frames.start <= self.end or (room is not None and len(frames) > room):
            raise PlanError(
                f"FrameCache: expected at most {room} frames that begin in [{lowest}, {self.end}], got frames "
                f"{frames.start} to {frames.stop - 1}"
            )

    def write(self, layer: int, frames: range, k: Tensor, v: Tensor) -> None:
        """Store keys and values `[B, F * S, H, D]` of `frames`; `commit` makes them count."""
        size = k.shape[1] // len(frames)
        buffers = self._buffer(layer, frames, k, v, size)
        for place, slots in self._runs(list(frames)):
            own = slice(place * size, (place + len(slots)) * size)
            for buffer, new in zip(buffers, (k, v), strict=True):
                buffer[:, slots.start * size : slots.stop * size] = new[:, own]

    def commit(self, frames: range) -> None:
        """Count `frames` as cached: call it when every layer has written them."""
        self.end = max(self.end, frames.stop)

    def read(self, layer: int, frames: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, F * S, H, D]` of `frames`; a view where their slots are contiguous.

        The result stands in slot order when `frames` fill slots 0 to F - 1 (see `in_slot_order`), else as given.
        """
        buffers = self._buffers[layer]
        if buffers is None:
            raise PlanError("FrameCache: nothing has been written yet")
        size = self._frame_tokens
        runs = self._runs(frames)
        k, v = (
            torch.cat([x[:, s.start * size : s.stop * size] for _, s in runs], dim=1)
            if len(runs) > 1
            else x[:, runs[0][1].start * size : runs[0][1].stop * size]
            for x in buffers
        )
        return k, v

    def in_slot_order(self, frames: list[int]) -> list[int]:
        """`frames` sorted by slot: attention does not mind the order, and a full window is then one view."""
        return sorted(frames, key=self.slot)

    def _runs(self, frames: list[int]) -> list[tuple[int, range]]:
        """Runs of consecutive slots, each with the place of its first frame in `frames`."""
        runs: list[tuple[int, range]] = []
        for place, slot in enumerate(map(self.slot, frames)):
            if runs and slot == runs[-1][1].stop:
                runs[-1] = (runs[-1][0], range(runs[-1][1].start, slot + 1))
            else:
                runs.append((place, range(slot, slot + 1)))
        return runs

    def _capacity(self, buffer: Tensor) -> int:
        return int(buffer.shape[1]) // self._frame_tokens

    def _buffer(self, layer: int, frames: range, k: Tensor, v: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Buffers of a layer, made at the first write and doubled when an unbounded cache is full."""
        buffers = self._buffers[layer]
        self._frame_tokens = size
        needed = self.window if self.window is not None else frames.stop - self.origin
        if buffers is None or self._capacity(buffers[0]) < needed:
            capacity = needed if self.window is not None or buffers is None else 2 * needed
            grown = tuple(x.new_zeros(x.shape[0], capacity * size, *x.shape[2:]) for x in (k, v))
            if buffers is not None:
                for new, old in zip(grown, buffers, strict=True):
                    new[:, : old.shape[1]] = old
            buffers = (grown[0], grown[1])
            self._buffers[layer] = buffers
        return buffers

    def restart(self, frame: int) -> None:
        """Forget everything; a new scene, with a new sink, begins at `frame`. Buffers are kept for reuse."""
        self.origin = self.end = self.oldest = frame

    @property
    def bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(x.numel() * x.element_size() for pair in self._buffers if pair is not None for x in pair)

    def state_dict(self) -> dict[str, Any]:
        """Tensors (copies) and indices; the settings are not in it."""
        buffers = [None if pair is None else tuple(x.clone() for x in pair) for pair in self._buffers]
        indices = {"origin": self.origin, "end": self.end, "oldest": self.oldest}
        return {**indices, "frame_tokens": self._frame_tokens, "buffers": buffers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()` of a cache with the same settings."""
        self.origin, self.end, self.oldest = state["origin"], state["end"], state["oldest"]
        self._frame_tokens = state["frame_tokens"]
        self._buffers = [None if pair is None else (pair[0].clone(), pair[1].clone()) for pair in state["buffers"]]
