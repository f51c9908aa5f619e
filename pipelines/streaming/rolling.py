"""Joint denoising of a rolling window: the oldest chunk almost clean, the newest pure noise (arXiv 2509.25161).

Needs weights that have seen mixed noise levels in one window; the schedule alone runs on any causal model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.pipelines.streaming.attention import CLEAN, Branch
from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.finished import Finished


@dataclass(frozen=True)
class InFlight:
    """A chunk that is being denoised.

    Args:
        start: its first frame.
        level: place in the ladder of its next pass.
        latents: `[B, C, F, h, w]` at that level.
    """

    start: int
    level: int
    latents: Tensor


class RollingDriver(ChunkDriver):
    """One window per chunk: every pass takes each chunk of the window one level down, and one new chunk joins.

    Chunk i is at level w - i of the ladder in window w. This one rule covers the beginning and the end of a stream, and
    streams shorter than the window. A prompt change holds for all chunks in flight.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.flight: list[InFlight] = []

    def _make(self) -> Finished:
        """Run windows until a chunk is finished."""
        while True:
            self.flight = self._window(self._joined())
            if self.flight[0].level == len(self.ladder):
                done = self.flight.pop(0)
                return Finished(done.start, done.latents)

    def _joined(self) -> list[InFlight]:
        """The chunks in flight and a new one of pure noise, unless the stream winds down."""
        if self.chunks is not None and self.made + len(self.flight) >= self.chunks:
            return self.flight
        length = self.settings.chunk
        start = self.flight[-1].start + length if self.flight else self.frame
        return [*self.flight, InFlight(start, 0, self.noise.draw(range(start, start + length)).to(self.device))]

    def _window(self, flight: list[InFlight]) -> list[InFlight]:
        """The chunks one level further, after one pass over all of them."""
        length = self.settings.chunk
        x = torch.cat([chunk.latents for chunk in flight], dim=2)
        timesteps = [self.ladder.timesteps[chunk.level] for chunk in flight for _ in range(length)]
        start = flight[0].start
        for branch in self.branches:
            branch.policy.begin_chunk(range(start, start + x.shape[2]))

        def past(branch: Branch) -> list[int]:
            return self._working(branch.cache, start, x.shape[2])

        velocity = self._velocity(x, timesteps, start, past, step=flight[0].level, write=False)
        return [self._down(chunk, part) for chunk, part in zip(flight, velocity.split(length, dim=2), strict=True)]

    def _down(self, chunk: InFlight, velocity: Tensor) -> InFlight:
        """A chunk one level further: re-noised with its own fresh noise, or clean after the last level."""
        x, level = self.ladder.clean(chunk.latents, velocity, chunk.level), chunk.level + 1
        if level < len(self.ladder):
            frames = range(chunk.start, chunk.start + x.shape[2])
            x = self.ladder.noisy(x, self.noise.draw(frames, level).to(self.device), level)
        return InFlight(chunk.start, level, x)

    def _working(self, cache: FrameCache, start: int, length: int) -> list[int]:
        """Cached frames that a window sees: the sink, and the newest others that fill up `settings.window`."""
        room = max(0, (self.settings.window or 0) - length - self.settings.sink)
        sink = [frame for frame in cache.kept if frame < cache.ring_start]
        rest = [frame for frame in cache.kept if cache.ring_start <= frame < start]
        return [*sink, *rest[len(rest) - min(room, len(rest)) :]]

    def _write(self, branch: Branch, chunk: Finished) -> None:
        """Cache a finished chunk, which sees the newest `settings.window` frames; the sink has no place of its own."""
        window = self.settings.window or 0
        past = [f for f in branch.cache.kept if chunk.frames.stop - window <= f < chunk.frames.start]
        branch.policy.begin_chunk(chunk.frames)
        self.runtime.forward(
            branch,
            self._to_model(chunk.latents),
            self.settings.context_noise,
            chunk.start,
            step=CLEAN,
            past=past,
        )

    def state_dict(self) -> dict[str, Any]:
        """With the chunks in flight."""
        flight = [{"start": x.start, "level": x.level, "latents": x.latents} for x in self.flight]
        return {**super().state_dict(), "flight": flight}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()` of a driver with the same settings and model."""
        super().load_state_dict(state)
        self.flight = [InFlight(x["start"], x["level"], x["latents"]) for x in state["flight"]]


def make_driver(*args: Any, **kwargs: Any) -> ChunkDriver:
    """The driver that `settings`, the second argument of `ChunkDriver`, ask for."""
    settings = args[1]
    return (RollingDriver if settings.rolling else ChunkDriver)(*args, **kwargs)
