"""Scores of key blocks that look at all tokens: exact mass, antidiagonals, sub-blocks.

All return log-masses in fp32 (fp64 for fp64), up to a constant per row: their softmax over the key blocks of a row is
the share of the attention mass that the scorer expects. -inf marks key blocks without real tokens. Work is cut into
groups of query blocks, so that memory stays near `_ELEMENTS` whatever the length.
Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import gather_blocks, real_tokens, working

# About 16 MB of fp32: larger groups gain nothing and leave the cache of a CPU.
_ELEMENTS = 2**22


def row_groups(rows: int, width: int) -> Iterator[slice]:
    """Cut `rows` rows of `width` elements into groups of about `_ELEMENTS` elements, at least one row each."""
    step = max(1, _ELEMENTS // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def log_mass(mass: Tensor, real: Tensor) -> Tensor:
    """ln of a mass `[B, H, nq, nk]` that may be 0; -inf only where `real` (broadcasts against it) is False."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log().masked_fill(~real, -torch.inf)


def block_sums(x: Tensor, blocks: Blocking) -> Tensor:
    """Sums over the blocks of the last axis: `[..., N]` becomes `[..., n]`."""
    if blocks.is_uniform:
        return F.pad(x, (0, -x.shape[-1] % blocks.size)).unflatten(-1, (blocks.count, blocks.size)).sum(-1)
    starts, lengths = blocks.on(x.device)
    place = torch.arange(blocks.size, device=x.device)
    token = torch.where(place < lengths.unsqueeze(-1), starts.unsqueeze(-1) + place, x.shape[-1])
    return F.pad(x, (0, 1)).index_select(-1, token.flatten()).unflatten(-1, token.shape).sum(-1)


def block_mass(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The exact attention mass of every pair of blocks: the oracle of all scores, and the search of arXiv 2502.21079.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry; padded keys get no mass, padded queries give none.
        lse: log-sum-exp of every query row, `[B, H, N]`. Default None: computed. With that of an earlier step one pass
            suffices; the rows of tokens are then off by a factor each.

    Returns:
        Mass, sum of softmax weights over the rows and columns of a pair `[B, H, nq, nk]` (a row sums to the number of
        its real queries), and the log-sum-exp `[B, H, N]` it was made with.
    """
    batch, heads, tokens, dim = q.shape
    q, k = working(q) * dim**-0.5, working(k)
    real = real_tokens(k.shape[2], layout.valid, k.device)[:, None, None]
    given, lse = lse is not None, q.new_zeros(batch, heads, tokens) if lse is None else lse
    mass = q.new_zeros(batch, heads, q_blocks.count, k_blocks.count)
    for group in row_groups(q_blocks.count, batch * heads * q_blocks.size * k.shape[2]):
        inside = slice(int(q_blocks.starts[group.start]), int(q_blocks.starts[group.stop]))
        logits = q[:, :, inside] @ k.transpose(-1, -2)
        if layout.is_padded:
            logits.masked_fill_(~real, -torch.inf)
        if given:
            # A stale log-sum-exp may be far off; beyond this bound exp would overflow.
            weights = block_sums(logits.sub_(lse[:, :, inside].unsqueeze(-1)).clamp_(max=60).exp_(), k_blocks)
        else:
            largest = logits.amax(-1, keepdim=True)
            weights = block_sums(logits.sub_(largest).exp_(), k_blocks)
            total = weights.sum(-1, keepdim=True)
            lse[:, :, inside] = (total.log() + largest).squeeze(-1)
            weights = weights / total
        if layout.is_padded:
            weights = weights.masked_fill(~real[..., inside].transpose(-1, -2), 0)
        rows = Blocking.from_lengths(q_blocks.lengths[group], q_blocks.size)
        mass[:, :, group] = block_sums(weights.transpose(-1, -2), rows).transpose(-1, -2)
    return mass, lse


def antidiagonal_scores(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, stride: int
) -> Tensor:
    """Log-mass by antidiagonals: of every stride x stride tile of QKᵀ only one is summed (arXiv 2503.16428).

    Groups of `stride` tokens, last query with first key, give one logit: the mean of the products on the antidiagonal.
    A softmax over all key groups and a sum over the groups of a pair of blocks give its score. Where a block ends
    within a group, the missing tokens stand at the mean of the group, and it counts by its share of real tokens: so
    the score does not depend on how the length is padded, and a constant added to all keys changes nothing. With an
    even stride the antidiagonals meet every stripe, but only those diagonals whose offset is odd.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        stride: tokens per group; 1 gives the exact mass.

    Returns:
        `[B, H, nq, nk]`.
    """
    queries, seen = _grouped(q, q_blocks, layout, stride)
    keys, counts = _grouped(k, k_blocks, layout, stride)
    queries = queries.flip(-2).flatten(-2) * (q.shape[-1] ** -0.5 / stride)
    keys = keys.flatten(2, 3).flatten(-2).transpose(-1, -2)
    bias = (counts / stride).log().flatten(1)[:, None, None]
    groups, scores = queries.shape[3], []
    for part in row_groups(q_blocks.count, q.shape[0] * q.shape[1] * groups * keys.shape[-1]):
        shares = (queries[:, :, part].flatten(2, 3) @ keys + bias).softmax(-1)
        shares = shares.unflatten(-1, (k_blocks.count, -1)).sum(-1).unflatten(2, (-1, groups))
        scores.append((shares * (seen / stride)[:, None, part, :, None]).sum(3))
    return log_mass(torch.cat(scores, 2), (counts.sum(-1) > 0)[:, None, None])


def _grouped(x: Tensor, blocks: Blocking, layout: TokenLayout, size: int) -> tuple[Tensor, Tensor]:
    """Groups of `size` consecutive tokens of every block, and how many are real.

    Returns `[B, H, n, G, size, D]`, missing tokens at the mean of their group, and counts `[B or 1, n, G]`.
    """
    rows, real = gather_blocks(x, blocks, layout.valid)
    rows = F.pad(rows, (0, 0, 0, -blocks.size % size)).unflatten(3, (-1, size))
    real = F.pad(real, (0, -blocks.size % size)).unflatten(-1, (-1, size))
    counts = real.sum(-1).to(rows.dtype)
    means = rows.sum(4, keepdim=True) / counts.clamp(min=1)[:, None, :, :, None, None]
    return torch.where(real[:, None, ..., None], rows, means), counts


def subblock_scores(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, q_parts: int, k_parts: int
) -> Tensor:
    """Log-sum-exp over the pairs of sub-blocks of a pair of blocks, each pooled to its mean.

    The score is ln Σ_ab m_a n_b exp(q̄_a·k̄_b / sqrt(D)) with m_a queries and n_b keys in the sub-blocks; with equal
    sub-blocks the counts are a constant. One part each is the pooled score. Source: "SubBlock" of SGLang.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        q_parts, k_parts: into how many runs of equal length each block is cut.

    Returns:
        `[B, H, nq, nk]`.
    """
    queries, seen = _part_means(q, q_blocks, layout, q_parts)
    keys, counts = _part_means(k, k_blocks, layout, k_parts)
    queries, keys = queries * q.shape[-1] ** -0.5, keys.flatten(2, 3).transpose(-1, -2)
    bias, parts, scores = counts.log().flatten(1)[:, None, None], queries.shape[3], []
    # Where a query block holds padding alone, its row is not used but must not become NaN.
    weight = torch.where(seen.sum(-1, keepdim=True) > 0, seen, 1.0).log()[:, None, :, :, None]
    for group in row_groups(q_blocks.count, q.shape[0] * q.shape[1] * parts * keys.shape[-1]):
        logits = queries[:, :, group].flatten(2, 3) @ keys + bias
        logits = logits.unflatten(-1, (k_blocks.count, -1)).logsumexp(-1).unflatten(2, (-1, parts))
        scores.append((logits + weight[:, :, group]).logsumexp(3))
    return torch.cat(scores, 2)


def _part_means(x: Tensor, blocks: Blocking, layout: TokenLayout, parts: int) -> tuple[Tensor, Tensor]:
    """Means `[B, H, n, P, D]` and counts `[B or 1, n, P]` of the runs into which every block is cut."""
    size = -(-blocks.size // parts)
    rows, real = gather_blocks(x, blocks, layout.valid)
    sums = F.pad(rows, (0, 0, 0, -blocks.size % size)).unflatten(3, (-1, size)).sum(4)
    counts = F.pad(real, (0, -blocks.size % size)).unflatten(-1, (-1, size)).sum(-1).to(sums.dtype)
    return sums / counts.clamp(min=1)[:, None, ..., None], counts
