"""The widest floating-point type of a device: sums of many small shares want fp64, which Apple's GPUs (MPS) lack."""

from __future__ import annotations

import torch
from torch import Tensor

_WITHOUT_FP64 = ("mps",)


def widest(device: torch.device) -> torch.dtype:
    """fp64, or fp32 on a device without it."""
    return torch.float32 if device.type in _WITHOUT_FP64 else torch.float64


def widened(x: Tensor) -> Tensor:
    """`x` in the widest floating-point type of its device."""
    return x.to(widest(x.device))
