"""Rotary positions of a stream: space at the write, time where the rule says, on the fly for any frame index.

Head channels stand as in Diffusers' `WanRotaryPosEmbed`: time, height, width, interleaved pairs. Time occupies the
first channels, so that rotating in time and rotating in space touch different channels and commute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.streaming import Frequencies, Positions

THETA = 10000.0
"""Base of the rotary embedding; `WanTransformer3DModel` offers no other."""


def time_frequencies(dim: int, theta: float, change: Frequencies) -> Tensor:
    """Angle per frame of each temporal pair, fp64 `[dim / 2]`.

    Args:
        dim: temporal channels of a head.
        theta: base of the rotary embedding.
        change: see `Frequencies`; "none" gives theta^(-2 i / dim).
    """
    base = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    if change.mode == "none":
        return base
    if change.mode == "riflex":
        wanted = 2 * math.pi / (change.trained if change.period is None else change.period)
        nearest = int((base.log() - math.log(wanted)).abs().argmin())
        base[nearest] = 0.9 * 2 * math.pi / change.target
        return base
    turns = change.trained * base / (2 * math.pi)
    keep = ((turns - change.low) / (change.high - change.low)).clamp(0, 1)
    stretch = max(1.0, change.target / change.trained)
    return base * (keep + (1 - keep) / stretch)


class Rotary:
    """Rotates queries and keys of a Wan transformer at any frame index, fractional ones included.

    Args:
        rope: the transformer's own `rope` module, which says sizes and tables.
        change: change of the temporal frequencies. Default: none.
    """

    def __init__(self, rope: Any, change: Frequencies | None = None) -> None:
        self.time_dim, self.max_frames = int(rope.t_dim), int(rope.max_seq_len)
        self._cos, self._sin = rope.freqs_cos, rope.freqs_sin
        self._frequencies = time_frequencies(self.time_dim, THETA, change or Frequencies())
        self._time_table = lru_cache(maxsize=8)(self._make_time_table)
        self._space_table = lru_cache(maxsize=8)(self._make_space_table)

    def space(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """x `[B, F * S, H, D]` rotated by row and column of its token; S = height * width of `grid`."""
        cos, sin = self._space_table(grid, x.device)
        dim = self.time_dim
        frames = x.unflatten(1, (-1, grid[0] * grid[1]))
        return torch.cat([frames[..., :dim], _rotate(frames[..., dim:], cos, sin)], dim=-1).flatten(1, 2)

    def time(self, x: Tensor, positions: Sequence[float]) -> Tensor:
        """x `[B, F * S, H, D]` rotated in time, one position for each of its F frames."""
        cos, sin = self._time_table(tuple(positions), x.device)
        dim = self.time_dim
        frames = x.unflatten(1, (len(positions), -1))
        return torch.cat([_rotate(frames[..., :dim], cos, sin), frames[..., dim:]], dim=-1).flatten(1, 2)

    def _make_time_table(self, positions: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        angles = torch.tensor(positions, dtype=torch.float64)[:, None] * self._frequencies
        angles = angles[:, None, None]
        return angles.cos().float().to(device), angles.sin().float().to(device)

    def _make_space_table(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine `[S, 1, (D - t) / 2]` from the module's own tables."""
        height, width = grid
        dim = (self._cos.shape[1] - self.time_dim) // 2
        tables = []
        for table in (self._cos, self._sin):
            rows, columns = table[:, self.time_dim :].split(dim, dim=1)
            rows, columns = rows[:height, None, ::2].expand(-1, width, -1), columns[None, :width, ::2]
            both = torch.cat([rows, columns.expand(height, -1, -1)], dim=-1)
            tables.append(both.reshape(height * width, 1, dim).to(device))
        return tables[0], tables[1]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Interleaved pairs of x `[..., D]` by the angles of cos and sin `[..., D / 2]`, in at least fp32."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


class PositionRule:
    """Which temporal position each attended frame has.

    Args:
        name: "absolute", "reindex" or "sink_adjacent", see `StreamSettings`.
        sink: frames of the sink.
        max_frames: length of the model's position table, a bound for "absolute".
    """

    def __init__(self, name: Positions, sink: int, max_frames: int) -> None:
        self.name, self.sink, self.max_frames = name, sink, max_frames

    @property
    def is_fixed(self) -> bool:
        """Whether a frame keeps its position for ever, so that keys can be stored rotated."""
        return self.name == "absolute"

    def of(self, frames: Sequence[int], origin: int) -> list[float]:
        """Positions of `frames` (ascending, as attended), which belong to a scene that began at frame `origin`.

        Raises:
            UnsupportedError: an absolute position beyond the model's table.
        """
        if self.name == "reindex":
            return [float(place) for place in range(len(frames))]
        if self.name == "sink_adjacent":
            first = next((frame for frame in frames if frame - origin >= self.sink), None)
            shift = 0 if first is None else first - sum(frame < first for frame in frames)
            return [
                float(place + shift if frame - origin < self.sink and first is not None else frame)
                for place, frame in enumerate(frames)
            ]
        if frames and frames[-1] - origin >= self.max_frames:
            raise UnsupportedError(
                f"positions='absolute': frame {frames[-1] - origin} is beyond the model's table of {self.max_frames}; "
                "use positions='reindex' for endless streams"
            )
        return [float(frame - origin) for frame in frames]
