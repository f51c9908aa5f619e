"""How a token axis is cut into blocks, any of which may be short.

Axis legend: N tokens, n blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.transfer import to_device


@dataclass(frozen=True, eq=False)
class Blocking:
    """A partition of a token axis into consecutive blocks, any of which may be shorter than `size`.

    Args:
        starts: int64 `[n + 1]` on the CPU, first token of every block and, last, the number of tokens.
        size: the largest block length allowed, in tokens.

    Raises:
        PlanError: `starts` does not begin at 0, does not increase, or a block is longer than `size`.
    """

    starts: Tensor
    size: int
    _on: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        starts = self.starts
        if starts.dtype != torch.int64 or starts.ndim != 1 or len(starts) < 2 or starts.device.type != "cpu":
            raise PlanError(f"Blocking.starts: expected int64 [n + 1] on the CPU with n >= 1, got {starts}")
        lengths = starts.diff()
        if starts[0] != 0 or lengths.min() < 1 or lengths.max() > self.size:
            raise PlanError(f"Blocking.starts: blocks must hold 1 to {self.size} tokens and begin at 0")

    @classmethod
    def uniform(cls, tokens: int, size: int) -> Blocking:
        """Blocks of `size` tokens; the last one holds the ragged tail."""
        return cls.segments([tokens], size)

    @classmethod
    def segments(cls, segments: Iterable[int], size: int) -> Blocking:
        """Cut every segment (for example text, then video) into blocks of `size`, so that no block crosses a border."""
        if size < 1:
            raise PlanError(f"Blocking: block size must be at least 1, got {size}")
        starts, offset = [0], 0
        for tokens in segments:
            starts += [min(offset + i, offset + tokens) for i in range(size, tokens + size, size)]
            offset += tokens
        return cls(torch.tensor(starts, dtype=torch.int64), size)

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, size: int | None = None) -> Blocking:
        """Blocks of the given lengths (all at least 1); `size` defaults to the longest."""
        lengths = torch.as_tensor(lengths, dtype=torch.int64).cpu()
        starts = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        return cls(starts, int(lengths.max()) if size is None else size)

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.starts) - 1

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return int(self.starts[-1])

    @property
    def lengths(self) -> Tensor:
        """True length of every block, int64 `[n]` on the CPU."""
        return self.starts.diff()

    @cached_property
    def is_uniform(self) -> bool:
        """Whether every block but the last holds exactly `size` tokens."""
        return bool((self.starts[:-1] == torch.arange(self.count) * self.size).all())

    def on(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """Block starts int32 `[n]` and lengths int32 `[n]` on `device`; copied there once."""
        device = torch.device(device)
        if device not in self._on:
            self._on[device] = (
                to_device(self.starts[:-1].to(torch.int32), device),
                to_device(self.lengths.to(torch.int32), device),
            )
        return self._on[device]

    def block_of_token(self) -> Tensor:
        """Index of the block that holds each token, int64 `[N]`."""
        return torch.repeat_interleave(torch.arange(self.count), self.lengths)

    def same_as(self, other: Blocking) -> bool:
        """Whether both cut the axis at the same places."""
        return self.size == other.size and torch.equal(self.starts, other.starts)
