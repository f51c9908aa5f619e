"""Attention of a few sampled queries, for methods that look at a head before they decide.

Axis legend: B batch, H heads, N tokens, D head size, m sampled rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.selection.choose import generator_for
from dit_accel.transfer import to_device

# Logits of one chunk of heads; at 720p a single head of 64 rows has 4.8 million.
_CHUNK_LOGITS = 1 << 25


def sample_rows(layout: TokenLayout, count: int, *key: int) -> Tensor:
    """Video tokens drawn at random, one from each of `count` equal parts of the video, int64 `[m]` on the CPU.

    Args:
        layout: token geometry; text and padding are never drawn.
        count: wanted rows; all video tokens when there are no more.
        key: what the draw depends on, for example seed, layer and step; same key, same rows.
    """
    count = min(count, layout.video)
    generator = generator_for(torch.device("cpu"), *key)
    edges = torch.arange(count + 1) * layout.video // count
    place = torch.rand(count, generator=generator, dtype=torch.float64)
    return edges[:-1] + (place * edges.diff()).long() + layout.video_start


def real_keys(layout: TokenLayout, device: torch.device | str) -> Tensor | None:
    """Bool `[B, 1, 1, N]`: keys that are not padding; None when nothing is padded."""
    if not layout.is_padded or layout.valid is None:
        return None
    lengths = to_device(torch.tensor(layout.valid), device).view(-1, 1, 1, 1)
    return torch.arange(layout.tokens, device=device) < lengths


def sampled_logits(q: Tensor, k: Tensor, rows: Tensor, layout: TokenLayout) -> Iterator[tuple[slice, Tensor]]:
    """Scaled logits of the sampled queries with all keys, -inf for padding, a few heads at a time.

    Args:
        q, k: `[B, H, N, D]` in raster order.
        rows: int64 `[m]`.
        layout: token geometry.

    Yields:
        The heads, and their logits, fp32 (fp64 for fp64) `[B, h, m, N]`.
    """
    work = q.dtype if q.dtype == torch.float64 else torch.float32
    real, rows = real_keys(layout, q.device), to_device(rows, q.device)
    step = max(1, _CHUNK_LOGITS // (q.shape[0] * len(rows) * k.shape[2]))
    for first in range(0, q.shape[1], step):
        heads = slice(first, min(first + step, q.shape[1]))
        logits = q[:, heads, rows].to(work) @ k[:, heads].to(work).transpose(-1, -2) * q.shape[-1] ** -0.5
        yield heads, logits if real is None else logits.masked_fill(~real, -torch.inf)
