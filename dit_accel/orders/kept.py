"""Orders by content that later calls use too: one is kept for every layer and head, so it is kept small.

Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.state import CallContext

_HALF = 1 << 15


@dataclass(frozen=True, eq=False)
class PackedIndex:
    """A permutation of N tokens in 2 bytes per token, and N / 8 bytes for every bit that does not fit into them.

    Args:
        low: the lower 16 bits less 2^15, int16 `[..., N]`.
        high: the bits above, lowest first, of eight tokens per byte, uint8 `[..., ceil(N / 8)]` each.
    """

    low: Tensor
    high: tuple[Tensor, ...]

    @classmethod
    def of(cls, index: Tensor) -> PackedIndex:
        """Pack int64 `[..., N]` with values below N."""
        count = index.shape[-1]
        weights = 1 << torch.arange(8, device=index.device)
        high = []
        for bit in range(16, (count - 1).bit_length()):
            ones = F.pad(index >> bit & 1, (0, -count % 8)).unflatten(-1, (-1, 8))
            high.append((ones * weights).sum(-1).to(torch.uint8))
        return cls(((index & 0xFFFF) - _HALF).to(torch.int16), tuple(high))

    def unpacked(self) -> Tensor:
        """The permutation, int64 `[..., N]`."""
        index, count = self.low.long() + _HALF, self.low.shape[-1]
        places = torch.arange(8, device=index.device, dtype=torch.uint8)
        for bit, packed in enumerate(self.high, 16):
            ones = (packed.unsqueeze(-1) >> places & 1).flatten(-2)[..., :count]
            index |= ones.long() << bit
        return index

    @property
    def bytes(self) -> int:
        """Memory of both parts."""
        return sum(x.numel() * x.element_size() for x in (self.low, *self.high))


@dataclass(frozen=True, eq=False)
class KeptOrder:
    """An order that calls after the one it was made at use too.

    Args:
        step, places: what it was made at, and of which tokens.
        query, key: `[B, H, N]`.
    """

    step: int
    places: tuple[Any, ...]
    query: PackedIndex
    key: PackedIndex

    @classmethod
    def of(cls, order: TokenOrder, call: CallContext) -> KeptOrder:
        """The order made at a call."""
        return cls(call.step, _places(call.layout), PackedIndex.of(order.query), PackedIndex.of(order.key_index))

    def serves(self, q: Tensor, call: CallContext, steps: int) -> bool:
        """Whether it is for such queries `[B, H, N, D]`, and fewer than `steps` steps old."""
        made = self.query.low
        fits = self.places == _places(call.layout) and made.shape == q.shape[:3] and made.device == q.device
        return fits and 0 <= call.step - self.step < steps

    @property
    def order(self) -> TokenOrder:
        """The order itself."""
        return TokenOrder(self.query.unpacked(), self.key.unpacked())


def _places(layout: TokenLayout) -> tuple[Any, ...]:
    """What of a layout an order of its video tokens depends on: guidance branches may differ in their text."""
    valid = layout.valid if layout.pads_video else None
    return (layout.grid, layout.prefix_frames, layout.text, layout.text_position, valid)
