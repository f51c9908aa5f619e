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


def pair_blocks(k: Tensor, v: Tensor, blocks: Blocking, real: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Keys and values `[B, H, N, D]` side by side in blocks `[B, H, n, size, 2 * D]`, in one pass over each.

    Args:
        k, v: tokens.
        blocks: partition of the token axis.
        real: bool `[B or 1, n, size]`, which slots count; the others become zero, whatever they held. None: all.
        dtype: of the result.
    """
    batch, heads, tokens, dim = k.shape
    slots = blocks.count * blocks.size
    out = torch.empty(batch, heads, slots, 2 * dim, dtype=dtype, device=k.device)
    if blocks.is_uniform:
        out[:, :, tokens:] = 0
        out[:, :, :tokens, :dim] = k
        out[:, :, :tokens, dim:] = v
    else:
        index = slot_of_token(blocks, k.device)
        out.zero_()[..., :dim].index_copy_(2, index, k.to(dtype))
        out[..., dim:].index_copy_(2, index, v.to(dtype))
    if real is not None:
        out.masked_fill_(~real.view(-1, 1, slots, 1), 0)
    return out.view(batch, heads, blocks.count, blocks.size, 2 * dim)


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
