"""Means, variances and covariance squares of blocks of tokens in Triton, from one pass over the tokens.

The plain forms are in `dit_accel.selection`, which calls these where they run. Axis legend: B batch, H heads,
N tokens, D head size, n blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.operations import register_operation
from dit_accel.kernels.statistics_pass import launch_statistics
from dit_accel.kernels.triton_configs import pad_head_dim
from dit_accel.plan import Blocking

_BLOCKS, _REAL, _STEP = (16, 3, 16, 15), (50, 21), 3


def block_means_in_triton(x: Tensor, blocks: Blocking, kv_len: Tensor | None, parts: int = 1) -> Tensor:
    """Means over the real tokens of each block, fp32 `[B, H, n, D]`, 0 for a block without any.

    Args:
        x: `[B, H, N, D]`.
        blocks: partition of the tokens.
        kv_len: int32 `[B]`, leading tokens that are real. None: all.
        parts: into how many runs of equal length each block is cut first; n counts those that it takes to hold the
            longest block. Default 1.
    """
    runs = -(-blocks.size // -(-blocks.size // parts))
    (x,), means = _rows(x), _empty(x, blocks.count * runs)
    with torch.cuda.device_of(x):
        launch_statistics(x, None, blocks, kv_len, [means], parts=parts)
    return means[..., : x.shape[-1]]


def block_spread_in_triton(x: Tensor, blocks: Blocking, kv_len: Tensor | None, step: int = 1) -> tuple[Tensor, Tensor]:
    """Means over the real tokens of each block, and their variance per channel, both fp32 `[B, H, n, D]`.

    Args:
        x, blocks, kv_len: as above.
        step: take the variance over one token in so many, see `dit_accel.selection.covariance.sample_tokens`.
    """
    (x,), means, variance = _rows(x), _empty(x, blocks.count), _empty(x, blocks.count)
    with torch.cuda.device_of(x):
        launch_statistics(x, None, blocks, kv_len, [means], variance, step=step)
    return means[..., : x.shape[-1]], variance[..., : x.shape[-1]]


def covariance_squares_in_triton(
    k: Tensor, v: Tensor, blocks: Blocking, kv_len: Tensor | None, step: int = 1
) -> tuple[Tensor, Tensor]:
    """Means of k in each block, and squared lengths of the rows of Σ (k - mean) vᵀ, both fp32 `[B, H, n, D]`.

    k - mean is rounded to the dtype of v before the product.

    Args:
        k, v: `[B, H, N, D]`.
        blocks, kv_len: as above.
        step: take the sum over one token in so many; the means are those of all.
    """
    (k, v), means = _rows(k, v), _empty(k, blocks.count)
    with torch.cuda.device_of(k):
        squares = launch_statistics(k, v, blocks, kv_len, [means], squares=True, step=step)
    assert squares is not None
    return means[..., : k.shape[-1]], squares.sum(-2)[..., : k.shape[-1]]


def _rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The same with the channels of a token side by side."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def _empty(x: Tensor, blocks: int) -> Tensor:
    return x.new_empty(*x.shape[:2], blocks, pad_head_dim(x.shape[-1]), dtype=torch.float32)


def _case(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Blocking, Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, sum(_BLOCKS), 24, generator=generator).to(device, dtype) for _ in range(2))
    return k, v, Blocking.from_lengths(_BLOCKS), torch.tensor(_REAL, dtype=torch.int32, device=device)


def _check_means(device: torch.device, dtype: torch.dtype) -> str | None:
    k, _, blocks, kv_len = _case(device, dtype)
    halves = block_means_in_triton(k, blocks, kv_len, 2)[:, :, ::2].double()
    for step in (1, _STEP):
        got, spread = (x.double() for x in block_spread_in_triton(k, blocks, kv_len, step))
        for item, length in enumerate(_REAL):
            for j, part in enumerate(k[item].double().split(_BLOCKS, 1)):
                real = part[:, : max(0, length - int(blocks.starts[j]))]
                some = real[:, _sample(_BLOCKS[j], step)[: real.shape[1]]]
                first = real[:, : blocks.size // 2]
                wanted = some - some.sum(1, keepdim=True) / max(1, some.shape[1])
                for name, found, expected in (
                    ("means", got[item, :, j], real.sum(1) / max(1, real.shape[1])),
                    ("means of halves", halves[item, :, j], first.sum(1) / max(1, first.shape[1])),
                    ("variances", spread[item, :, j], wanted.square().sum(1) / max(1, some.shape[1])),
                ):
                    if not float((found - expected).abs().max()) < 1e-4:
                        return f"its {name} are wrong"
    return None


def _check_squares(device: torch.device, dtype: torch.dtype) -> str | None:
    k, v, blocks, _ = _case(device, dtype)
    for step in (1, _STEP):
        means, squares = (x.double() for x in covariance_squares_in_triton(k, v, blocks, None, step))
        parts = zip(k.double().split(_BLOCKS, 2), v.double().split(_BLOCKS, 2), strict=True)
        for j, (keys, values) in enumerate(parts):
            if not float((means[:, :, j] - keys.mean(2)).abs().max()) < 1e-4:
                return "its means are wrong"
            keys, values = (x[:, :, _sample(_BLOCKS[j], step)] for x in (keys, values))
            wanted = ((keys - keys.mean(2, keepdim=True)).transpose(-1, -2) @ values).square().sum(-1)
            if not float((squares[:, :, j] - wanted).abs().max() / wanted.max().clamp(min=1e-9)) < 1e-2:
                return "its squares are wrong"
    return None


def _sample(length: int, step: int) -> Tensor:
    """Bool `[length]`: the tokens that are looked at of a block, of at most 16."""
    numbers = torch.arange(16)
    chosen = torch.zeros(16, dtype=torch.bool)
    chosen[(numbers[::step] + torch.arange(len(numbers[::step])) % step).clamp(max=15)] = True
    return chosen[:length]


register_operation("block means", _check_means)
register_operation("covariance squares", _check_squares)
