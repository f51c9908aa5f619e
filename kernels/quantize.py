"""Operands of 8 bits, emulated: the numbers that a kernel works with, in wider arithmetic.

INT8 queries and keys are those of arXiv 2410.02367, FP8 weights and values those of arXiv 2411.10958.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_LARGEST_FP8 = 448
_LOG2_OF_WEIGHTS = 8  # the largest weight of a row is at most 2**8, which e4m3 holds


def round_to_int8(x: Tensor) -> Tensor:
    """Quantise and dequantise blocks `[..., size, D]`, one symmetric scale each, half rounded away from zero.

    The scale is max|x| / 127 + 1e-7, so that a block of zeros stays zero. Slots of padding must hold zeros.
    """
    step = x.abs().amax((-2, -1), keepdim=True).div_(127).add_(1e-7)
    return (x / step).add_(x.sign().mul_(0.5)).trunc_().mul_(step)


def mean_token(x: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real tokens of each head, `[B, H, 1, D]`. x `[B, H, N, D]`; real bool `[B, N]`, None: all."""
    if real is None:
        return x.mean(2, keepdim=True)
    inside = real[:, None, :, None]
    return x.masked_fill(~inside, 0).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)


def round_to_fp8(x: Tensor) -> Tensor:
    """Quantise and dequantise values `[..., N, D]` in e4m3, one scale per channel: max|x| / 448 + 1e-7.

    Tokens that do not count must hold zeros.
    """
    step = x.abs().amax(-2, keepdim=True).div_(_LARGEST_FP8).add_(1e-7)
    return (x / step).to(torch.float8_e4m3fn).to(x.dtype).mul_(step)


def weights_in_fp8(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weights of a softmax as they are multiplied with values in e4m3.

    Args:
        logits: `[..., L]`, in units of log 2; every row needs one above -inf, or what it gets is undefined.

    Returns:
        Rounded weights `[..., L]`, of which the largest lies in (128, 256]; the sum of what they are before they are
        rounded `[..., 1]`; and the natural log-sum-exp of the row `[...]`.
    """
    top = logits.amax(-1, keepdim=True).ceil() - _LOG2_OF_WEIGHTS
    weights = (logits - top).exp2()
    total = weights.sum(-1, keepdim=True)
    return weights.to(torch.float8_e4m3fn).to(logits.dtype), total, (top + total.log2()).squeeze(-1) * math.log(2)
