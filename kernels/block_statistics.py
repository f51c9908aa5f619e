"""Means and covariance squares of blocks of tokens in Triton, one pass over memory each.

The plain forms are in `dit_accel.selection`, which calls these where they run. Axis legend: B batch, H heads,
N tokens, D head size, n blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.operations import register_operation
from dit_accel.kernels.triton_configs import pad_head_dim
from dit_accel.kernels.triton_rest import launch_squares, launch_statistics
from dit_accel.plan import Blocking

_BLOCKS = (16, 3, 16, 15)


def block_means_in_triton(x: Tensor, blocks: Blocking, kv_len: Tensor | None) -> Tensor:
    """Means over the real tokens of each block, fp32 `[B, H, n, D]`, 0 for a block without any.

    Args:
        x: `[B, H, N, D]`.
        blocks: partition of the tokens.
        kv_len: int32 `[B]`, leading tokens that are real. None: all.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    means = x.new_empty(*x.shape[:2], blocks.count, pad_head_dim(x.shape[-1]), dtype=torch.float32)
    with torch.cuda.device_of(x):
        launch_statistics(x, None, blocks, kv_len, means, None)
    return means[..., : x.shape[-1]]


def covariance_squares_in_triton(k: Tensor, v: Tensor, blocks: Blocking, kv_len: Tensor | None) -> Tensor:
    """Squared lengths of the rows of Σ (k - mean) vᵀ over the real tokens of each block, fp32 `[B, H, n, D]`.

    k - mean is rounded to the dtype of v before the product. Arguments as above.
    """
    k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
    with torch.cuda.device_of(k):
        return launch_squares(k, v, blocks, kv_len).sum(-2)[..., : k.shape[-1]]


def _case(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Blocking, Tensor]:
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(2, 2, sum(_BLOCKS), 24, generator=generator).to(device, dtype) for _ in range(2))
    return k, v, Blocking.from_lengths(_BLOCKS), torch.tensor([50, 21], dtype=torch.int32, device=device)


def _check_means(device: torch.device, dtype: torch.dtype) -> str | None:
    k, _, blocks, kv_len = _case(device, dtype)
    got = block_means_in_triton(k, blocks, kv_len).double()
    for item, length in enumerate((50, 21)):
        for j, part in enumerate(k[item].double().split(_BLOCKS, 1)):
            real = part[:, : max(0, length - int(blocks.starts[j]))]
            wanted = real.sum(1) / max(1, real.shape[1])
            if not float((got[item, :, j] - wanted).abs().max()) < 1e-4:
                return "its means are wrong"
    return None


def _check_squares(device: torch.device, dtype: torch.dtype) -> str | None:
    k, v, blocks, _ = _case(device, dtype)
    got = covariance_squares_in_triton(k, v, blocks, None).double()
    for j, (keys, values) in enumerate(zip(k.double().split(_BLOCKS, 2), v.double().split(_BLOCKS, 2), strict=True)):
        wanted = ((keys - keys.mean(2, keepdim=True)).transpose(-1, -2) @ values).square().sum(-1)
        if not float((got[:, :, j] - wanted).abs().max() / wanted.max()) < 1e-2:
            return "its squares are wrong"
    return None


register_operation("block means", _check_means)
register_operation("covariance squares", _check_squares)
