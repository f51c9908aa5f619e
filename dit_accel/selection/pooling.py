"""Tokens gathered by block, and the scores that need one mean per block.

Axis legend: B batch, H heads, N tokens, D head size, n blocks, S slots of a block, nq / nk query / key blocks.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.kernels.block_scores import Slots, score_blocks
from dit_accel.kernels.block_statistics import block_means_in_triton
from dit_accel.kernels.operations import uses_triton
from dit_accel.kernels.statistics_pass import tokens_of
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.transfer import to_device

Valid = tuple[int, ...] | None
# What stands in the slots of a short block that hold no real token: nothing, its last one once more, or zeros, which
# count like tokens. Only "real" is unbiased; the others are what released code does.
Padding = Literal["real", "repeat", "zero"]


def working(x: Tensor) -> Tensor:
    """`x` in the arithmetic of scores, fp32 (fp64 for fp64): in bf16 many scores tie, and ties favour early blocks."""
    return x if x.dtype == torch.float64 else x.float()


def lengths_of(valid: Valid, device: torch.device) -> Tensor | None:
    """Leading tokens that count, int32 `[B]`; None: all."""
    return None if valid is None else to_device(torch.tensor(valid, dtype=torch.int32), device)


def real_tokens(tokens: int, valid: Valid, device: torch.device) -> Tensor:
    """Bool `[B or 1, N]`: which tokens are no padding. `valid`: leading tokens that count per batch item; None: all."""
    if valid is None:
        return torch.ones(1, tokens, dtype=torch.bool, device=device)
    return torch.arange(tokens, device=device) < to_device(torch.tensor(valid), device).unsqueeze(-1)


def real_blocks(blocks: Blocking, layout: TokenLayout, device: torch.device) -> Tensor:
    """Which blocks hold a real token, bool `[B or 1, 1, 1, n]`: padding stands last, so their first one is real."""
    first = blocks.on(device)[0].long()
    return real_tokens(layout.tokens, layout.valid, device)[:, first][:, None, None]


def gather_blocks(x: Tensor, blocks: Blocking, valid: Valid = None, padding: Padding = "real") -> tuple[Tensor, Tensor]:
    """The tokens of every block side by side, for any partition.

    Args:
        x: `[B, H, N, D]`.
        blocks: partition of the token axis; S = `blocks.size`.
        valid: leading tokens that count, per batch item. None: all.
        padding: what stands in the slots of a short block, see `Padding`. A block without a real token stays empty.

    Returns:
        Tokens, fp32 (fp64 for fp64) `[B, H, n, S, D]`, 0 where a slot holds no token; bool `[B or 1, n, S]`, which
        slots count.
    """
    if valid is None and blocks.is_uniform and blocks.tokens % blocks.size == 0:
        every = torch.ones(1, blocks.count, blocks.size, dtype=torch.bool, device=x.device)
        return working(x).unflatten(2, (blocks.count, blocks.size)), every
    starts, lengths = blocks.on(x.device)
    place = torch.arange(blocks.size, device=x.device)
    # Slots that hold no token read one of zeros behind the last, which costs less than filling them in.
    token = torch.where(place < lengths.unsqueeze(-1), starts.unsqueeze(-1) + place, x.shape[2])
    real = F.pad(real_tokens(x.shape[2], valid, x.device), (0, 1))[:, token]
    if blocks.is_uniform:
        rows = without_padding(x, valid, token.numel() - x.shape[2])
    else:
        rows = without_padding(x, valid, 1).index_select(2, token.flatten())
    rows = rows.unflatten(2, token.shape)
    if padding == "real":
        return rows, real
    length = real.sum(-1, keepdim=True)
    if padding == "repeat":
        last = (length - 1).clamp(min=0)[:, None, ..., None].expand(*rows.shape[:3], 1, rows.shape[4])
        rows = torch.where(real[:, None, ..., None], rows, rows.gather(3, last))
    return rows, (length > 0).expand(real.shape)


def without_padding(x: Tensor, valid: Valid, more: int = 0) -> Tensor:
    """A copy of tokens `[B, H, N, D]` in fp32 (fp64 for fp64), 0 at padding, with `more` tokens of zeros behind it."""
    return _clear_padding(F.pad(working(x), (0, 0, 0, more)) if more else working(x).clone(), valid)


def _clear_padding(rows: Tensor, valid: Valid) -> Tensor:
    """`rows` `[B, H, N, D]`, overwritten with 0 at padding."""
    # It stands last, so it is a slice: on a CPU a mask over all tokens costs more than all else that scores need.
    for item, length in enumerate(valid or ()):
        (rows if len(valid or ()) == 1 else rows[item])[..., length:, :] = 0
    return rows


def block_means(x: Tensor, blocks: Blocking, valid: Valid = None, padding: Padding = "real") -> tuple[Tensor, Tensor]:
    """Mean of the tokens of every block, and how many count.

    Args:
        x: `[B, H, N, D]`.
        blocks: partition of the token axis.
        valid: leading tokens that count, per batch item. None: all.
        padding: what stands in the slots of a short block, see `Padding`.

    Returns:
        Means, fp32 (fp64 for fp64) `[B, H, n, D]`, 0 for a block without valid tokens; counts `[B or 1, 1, n]`.
    """
    if padding == "real" and uses_triton("block means", x):
        return block_means_in_triton(x, blocks, lengths_of(valid, x.device)), token_counts(blocks, valid, x)
    rows, real = gather_blocks(x, blocks, valid, padding)
    counts = real.sum(-1).to(rows.dtype).unsqueeze(1)
    return rows.sum(3) / counts.clamp(min=1).unsqueeze(-1), counts


def token_counts(blocks: Blocking, valid: Valid, like: Tensor) -> Tensor:
    """Number of real tokens of each block, fp32 `[B or 1, 1, n]` where `like` is."""
    return tokens_of(blocks, lengths_of(valid, like.device), like.device).to(torch.float32).unsqueeze(1)


def smooth_keys(k: Tensor, valid: Valid = None) -> Tensor:
    """Keys less the mean of the real keys of their head: the softmax is the same, pooling and rounding lose less.

    k `[B, H, N, D]`; the result is fp32 (fp64 for fp64), 0 at padding. Source: arXiv 2410.02367.
    """
    if valid is None:
        k = working(k)
        return k - k.mean(2, keepdim=True)
    keys = without_padding(k, valid)
    count = to_device(torch.tensor(valid, dtype=keys.dtype), k.device).view(-1, 1, 1, 1)
    return _clear_padding(keys.sub_(keys.sum(2, keepdim=True) / count), valid)


def self_similarity(x: Tensor, blocks: Blocking, valid: Valid = None, padding: Padding = "real") -> Tensor:
    """How much the tokens of a block agree: the mean cosine over all pairs of them, in [0, 1], `[B, H, n]`.

    The sum over all pairs is the squared length of the sum of unit vectors, so no pair is ever formed. A block without
    real tokens gets 1. x `[B, H, N, D]`. Source: arXiv 2502.18137, in the form of its released code.
    """
    rows, real = gather_blocks(x, blocks, valid, padding)
    # The sum of unit vectors as a product with one over their lengths: they are never written out.
    inverse = torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp(min=1e-12).reciprocal()
    total = (inverse.transpose(-1, -2) @ rows).squeeze(-2)
    count = real.sum(-1).unsqueeze(1)
    similarity = total.square().sum(-1) / count.clamp(min=1).square()
    return similarity.clamp(max=1).masked_fill(count == 0, 1)


def pooled_scores(
    q: Tensor,
    k: Tensor,
    blocks: Blocking,
    layout: TokenLayout,
    k_blocks: Blocking | None = None,
    padding: Padding = "real",
) -> Tensor:
    """Log-mass of each key block as seen by the mean query of each query block, `[B, H, nq, nk]`.

    The score of a block of n keys is q̄·k̄ / sqrt(D) + ln n; -inf for a block without valid tokens.

    Args:
        q, k: `[B, H, N, D]`.
        blocks: partition of the queries, and of the keys unless `k_blocks` is given.
        layout: token geometry.
        k_blocks: partition of the keys. Default: `blocks`.
        padding: what stands in the slots of a short block, see `Padding`.
    """
    mean_q, _ = block_means(q, blocks, layout.valid, padding)
    mean_k, counts = block_means(k, blocks if k_blocks is None else k_blocks, layout.valid, padding)
    return scores_of_means(mean_q, mean_k, counts)


def scores_of_means(mean_q: Tensor, mean_k: Tensor, counts: Tensor) -> Tensor:
    """The same from the means `[B, H, n, D]` of the blocks and the counts `[B or 1, 1, nk]` of keys."""
    if uses_triton("block scores", mean_q):
        return score_blocks(_rows_of_means(mean_q), _rows_of_means(mean_k, counts))
    scores: Tensor = mean_q.shape[-1] ** -0.5 * (mean_q @ mean_k.transpose(-1, -2)) + counts.log().unsqueeze(-2)
    return scores


def _rows_of_means(means: Tensor, weight: Tensor | None = None) -> Slots:
    """One slot to a block: its mean `[B, H, n, D]`, which weighs 1 or as said, `[B or 1, 1, n]`."""
    at = torch.arange(means.shape[2], dtype=torch.int32, device=means.device).view(1, 1, -1, 1)
    if weight is None:
        return Slots(means, at, torch.ones_like(at), torch.ones_like(at, dtype=torch.float32))
    at = at.expand(*weight.shape, 1)
    return Slots(means, at, torch.ones_like(at), weight.unsqueeze(-1).float())
