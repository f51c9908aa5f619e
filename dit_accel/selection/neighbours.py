"""Blocks that touch in the video."""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking


def touching_blocks(layout: TokenLayout, blocks: Blocking, order: TokenOrder | None = None) -> Tensor:
    """Which blocks hold tokens within 3 x 3 x 3 of each other, bool `[n, n]` on the CPU, symmetric; text touches none.

    Args:
        layout: token geometry.
        blocks: partition of the tokens as they stand in `order`.
        order: one for all heads. Default: the raster.
    """
    index = torch.arange(layout.tokens) if order is None else order.query.cpu()
    starts = tuple(blocks.starts.tolist())
    return _touching(layout, starts, index.numpy().tobytes()).clone()


@lru_cache(maxsize=16)
def _touching(layout: TokenLayout, starts: tuple[int, ...], index: bytes) -> Tensor:
    order = torch.frombuffer(bytearray(index), dtype=torch.int64)
    owner = torch.empty_like(order)
    lengths = torch.tensor(starts).diff()
    owner[order] = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    grid = owner[layout.video_slice()].view(layout.grid)
    mask = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)
    for step in product((-1, 0, 1), repeat=3):
        here = grid[tuple(slice(max(0, -s), n - max(0, s)) for s, n in zip(step, layout.grid, strict=True))]
        there = grid[tuple(slice(max(0, s), n - max(0, -s)) for s, n in zip(step, layout.grid, strict=True))]
        mask[here.flatten(), there.flatten()] = True
    return mask
