"""Scores for selections whose rest is approximated: what is approximated badly is worth computing."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_statistics import block_spread_in_triton, covariance_squares_in_triton
from dit_accel.kernels.operations import uses_triton
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import (
    Valid,
    block_means,
    gather_blocks,
    lengths_of,
    scores_of_means,
    token_counts,
)
from dit_accel.selection.scores import row_groups
from dit_accel.transfer import to_device

_SHARPNESS = 0.85
_SAMPLES = 16  # tokens of a block that its covariance needs: with all of them the choice is no better
_FLOOR = 1e-5  # of the published code: keeps the logarithm of a block of identical keys or values finite


def covariance_norms(k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Frobenius norm of H = Σ (k - k̄) vᵀ over the real tokens of each block, `[B, H, n]`. k, v `[B, H, N, D]`."""
    return covariance_squares(k, v, blocks, layout).sum(-1).sqrt()


def covariance_squares(k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Squared lengths of the rows of H = Σ (k - k̄) vᵀ, one per channel of the keys, `[B, H, n, D]`.

    Args:
        k, v: `[B, H, N, D]`.
        blocks: partition of the keys.
        layout: token geometry; padding counts for nothing.
    """
    return _squares(k, v, blocks, layout.valid)


def _squares(k: Tensor, v: Tensor, blocks: Blocking, valid: Valid) -> Tensor:
    if uses_triton("covariance squares", k):
        return covariance_squares_in_triton(k, v, blocks, lengths_of(valid, k.device))[1]
    (keys, real), (values, _) = (gather_blocks(x, blocks, valid) for x in (k, v))
    counts = real.sum(-1).to(keys.dtype).clamp(min=1)[:, None, :, None, None]
    real = real[:, None, :, :, None]
    squares, dim = [], k.shape[-1]
    for group in row_groups(blocks.count, k.shape[0] * k.shape[1] * dim * max(dim, blocks.size), k.device):
        inside = keys[:, :, group]
        # The deviations sum to zero, so the mean of one factor is enough.
        delta = (inside - inside.sum(3, keepdim=True) / counts[:, :, group]).mul_(real[:, :, group])
        squares.append((delta.transpose(-1, -2) @ values[:, :, group]).square_().sum(-1))
    return torch.cat(squares, 2)


def sample_tokens(blocks: Blocking, stride: int) -> tuple[Tensor, Blocking]:
    """One of `stride` tokens of every block, int64 `[m]` on the CPU, and the blocks that they form.

    Places move on by one within the stride, so that no column of a box is left out; every block keeps its first token.
    """
    first = torch.arange(0, blocks.size, stride)
    places = (first + torch.arange(len(first)) % stride).clamp(max=blocks.size - 1)
    inside = places < blocks.lengths.unsqueeze(-1)
    return (blocks.starts[:-1].unsqueeze(-1) + places)[inside], Blocking.from_lengths(inside.sum(-1), len(places))


def covariance_scores(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout, k_blocks: Blocking | None = None
) -> Tensor:
    """Pooled log-mass plus ln(‖H‖ + 1e-5): mass times what the mean key hides (arXiv 2602.01077, as released).

    The paper's equation has the spectral norm of H less its mean over the blocks; the released code has this one.

    Args:
        q, k, v: `[B, H, N, D]`.
        blocks: partition of the queries, and of the keys unless `k_blocks` is given.
        layout: token geometry.
        k_blocks: partition of the keys. Default: `blocks`.

    Returns:
        `[B, H, nq, nk]`, -inf at blocks without real keys.
    """
    mean_q, _ = block_means(q, blocks, layout.valid)
    mean_k, counts, squares = _means_and_squares(k, v, k_blocks or blocks, layout.valid, 1)
    hidden = (squares.sum(-1).sqrt() + _FLOOR).log()
    return scores_of_means(mean_q, mean_k, counts) + hidden.unsqueeze(-2)


def error_scores(
    q: Tensor, k: Tensor, v: Tensor, blocks: Blocking, layout: TokenLayout, k_blocks: Blocking | None = None
) -> Tensor:
    """Logarithm of what an expansion about the mean query gets wrong when it stands for a block (this project).

    To first order the value of a block of n keys errs by (q - q̄)ᵀ H / n at a query q. Its mean square, with the
    covariance of the queries of the block taken as diagonal, is weighed by the mass of the block, as the pooled map has
    it, to the power 0.85: pooling makes the map too sharp. Unlike scores that are log-masses up to a constant per row,
    these compare rows and heads with one another: where queries or keys are alike, few exact blocks are needed.
    Covariances are taken over 16 tokens of a block or more, one in `block size // 16`; means over all.

    Args:
        q, k, v: `[B, H, N, D]`.
        blocks: partition of the queries, and of the keys unless `k_blocks` is given.
        layout: token geometry.
        k_blocks: partition of the keys. Default: `blocks`.

    Returns:
        `[B, H, nq, nk]`, -inf at blocks without real keys.
    """
    k_blocks = k_blocks or blocks
    stride = _stride(k_blocks)
    mean_q, variance = _means_and_variance(q, blocks, layout.valid, _stride(blocks))
    mean_k, counts, squares = _means_and_squares(k, v, k_blocks, layout.valid, stride)
    hidden = (variance * (stride**2 / q.shape[-1])) @ squares.transpose(-1, -2)
    shares = scores_of_means(mean_q, mean_k, counts).log_softmax(-1)
    return hidden.add_(_FLOOR**2).log_().mul_(0.5).add_(shares, alpha=_SHARPNESS)


def _stride(blocks: Blocking) -> int:
    """One token in how many its statistics are taken from."""
    return max(1, blocks.size // _SAMPLES)


def _means_and_variance(x: Tensor, blocks: Blocking, valid: Valid, stride: int) -> tuple[Tensor, Tensor]:
    """Means of the blocks of x `[B, H, N, D]`, and variance over one token in `stride`, both `[B, H, n, D]`."""
    if uses_triton("block means", x):
        return block_spread_in_triton(x, blocks, lengths_of(valid, x.device), stride)
    (some,), parts, own = _sampled((x,), blocks, valid, stride)
    rows, real = gather_blocks(some, parts, own)
    counts = real.sum(-1).to(rows.dtype).clamp(min=1)[:, None, :, None]
    variance = rows.square().sum(3) / counts - (rows.sum(3) / counts).square()
    return block_means(x, blocks, valid)[0], variance.clamp_(min=0)


def _means_and_squares(
    k: Tensor, v: Tensor, blocks: Blocking, valid: Valid, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the blocks of k, how many keys count `[B or 1, 1, n]`, and squares over one token in `stride`."""
    if uses_triton("covariance squares", k):
        means, squares = covariance_squares_in_triton(k, v, blocks, lengths_of(valid, k.device), stride)
        return means, token_counts(blocks, valid, k), squares
    means, counts = block_means(k, blocks, valid)
    (keys, values), parts, own = _sampled((k, v), blocks, valid, stride)
    return means, counts, _squares(keys, values, parts, own)


def _sampled(
    tensors: tuple[Tensor, ...], blocks: Blocking, valid: Valid, stride: int
) -> tuple[tuple[Tensor, ...], Blocking, Valid]:
    """One in `stride` tokens of every block of `[B, H, N, D]`, the blocks that they form, and how many count."""
    if stride == 1:
        return tensors, blocks, valid
    tokens, parts = sample_tokens(blocks, stride)
    valid = valid and tuple(int((tokens < n).sum()) for n in valid)
    places = to_device(tokens, tensors[0].device)
    return tuple(x.index_select(2, places) for x in tensors), parts, valid
