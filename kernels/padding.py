"""Bring tokens into blocks of one size, with what is not a real token zeroed and counted."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.plan import Blocking


def to_blocks(x: Tensor, blocks: Blocking, real: Tensor | None = None) -> Tensor:
    """Tokens `[B, H, N, D]` as blocks `[B, H, n, size, D]`; a view where nothing has to be padded.

    Args:
        x: tokens.
        blocks: partition of the token axis.
        real: bool `[B, N]`, which tokens count; the others become zero, whatever they held. None: all.
    """
    batch, heads, tokens, dim = x.shape
    if real is None and blocks.is_uniform and tokens % blocks.size == 0:
        return x.contiguous().view(batch, heads, blocks.count, blocks.size, dim)
    if real is not None:
        x = x.masked_fill(~real[:, None, :, None], 0)
    out = x.new_zeros(batch, heads, blocks.count * blocks.size, dim)
    return out.index_copy_(2, slot_of_token(blocks, x.device), x).view(batch, heads, blocks.count, blocks.size, dim)


def from_blocks(x: Tensor, blocks: Blocking) -> Tensor:
    """Undo `to_blocks`: `[B, H, n, size, ...]` to tokens `[B, H, N, ...]`."""
    flat = x.flatten(2, 3)
    if blocks.is_uniform:
        return flat[:, :, : blocks.tokens]
    return flat.index_select(2, slot_of_token(blocks, x.device))


def slot_of_token(blocks: Blocking, device: torch.device) -> Tensor:
    """Where each token stands in the padded axis `n * size`, int64 `[N]`."""
    index = blocks.block_of_token()
    return (index * blocks.size + torch.arange(blocks.tokens) - blocks.starts[index]).to(device)


def real_slots(blocks: Blocking, kv_len: Tensor | None, device: torch.device) -> Tensor:
    """Bool `[B or 1, n, size]`: which slots of the padded axis hold a real token."""
    starts, lengths = (x.unsqueeze(-1) for x in blocks.on(device))
    offset = torch.arange(blocks.size, device=device)
    inside = (offset < lengths).unsqueeze(0)
    return inside if kv_len is None else inside & (starts + offset < kv_len.view(-1, 1, 1))
