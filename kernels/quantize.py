"""INT8 queries and keys, emulated: the numbers an integer kernel works with, in floating point (arXiv 2410.02367)."""

from __future__ import annotations

from torch import Tensor


def round_to_int8(x: Tensor) -> Tensor:
    """Quantise and dequantise blocks `[..., size, D]`, one symmetric scale each, half rounded away from zero.

    The scale is max|x| / 127 + 1e-7, so that a block of zeros stays zero. Slots of padding must hold zeros.
    """
    step = x.abs().amax((-2, -1), keepdim=True).div_(127).add_(1e-7)
    return (x / step).add_(x.sign().mul_(0.5)).trunc_().mul_(step)


def mean_key(k: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the real keys of each head, `[B, H, 1, D]`. k `[B, H, N, D]`; real bool `[B, N]`, None: all."""
    if real is None:
        return k.mean(2, keepdim=True)
    inside = real[:, None, :, None]
    return k.masked_fill(~inside, 0).sum(2, keepdim=True) / inside.sum(2, keepdim=True).clamp(min=1)
