"""Blocks that are attended whatever their score: a block's own tokens, neighbours, text, and a sink of first frames."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking
from dit_accel.transfer import to_device


def own_blocks(q_blocks: Blocking, k_blocks: Blocking, reach: int = 0) -> Tensor:
    """Which key blocks share tokens with each query block, bool `[nq, nk]` on the CPU.

    Args:
        q_blocks, k_blocks: partitions of the same tokens.
        reach: how many neighbours on each side are kept too. Default 0.
    """
    last = k_blocks.count - 1
    edges = torch.stack([q_blocks.starts[:-1], q_blocks.starts[1:] - 1])
    low, high = torch.searchsorted(k_blocks.starts[1:].contiguous(), edges, right=True)
    column = torch.arange(k_blocks.count)
    return (column >= (low - reach).clamp(min=0)[:, None]) & (column <= (high + reach).clamp(max=last)[:, None])


def sink_blocks(layout: TokenLayout, blocks: Blocking, frames: int, order: TokenOrder | None = None) -> Tensor:
    """Which key blocks hold a token of the first `frames` frames, or of the layout's conditioning prefix.

    Args:
        layout: token geometry.
        blocks: partition of the keys as they stand in `order`.
        frames: leading frames to keep; the layout's `prefix_frames` are kept in any case.
        order: how keys stand. Default: raster.

    Returns:
        Bool `[n]`, or `[B or 1, H or 1, n]` for an order per head.
    """
    frame = torch.full((layout.tokens,), layout.frames, dtype=torch.int64)
    frame[layout.video_slice()] = layout.coordinates[:, 0].long()
    if order is not None:
        frame = to_device(frame, order.key_index.device)[order.key_index]
    owner = to_device(blocks.block_of_token(), frame.device).expand_as(frame)
    earliest = torch.full((*frame.shape[:-1], blocks.count), layout.frames, device=frame.device)
    earliest = earliest.scatter_reduce(-1, owner, frame, "amin")
    return earliest < max(frames, layout.prefix_frames)
