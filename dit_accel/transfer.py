"""Small tensors from the host to a device without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device | str) -> Tensor:
    """`x` on `device`; itself when it is there.

    From the CPU to a CUDA device it goes through page-locked memory: from pageable memory the host would wait until the
    device has done everything before, at every call. A tensor on "meta" has nothing to wait for.
    """
    kind = torch.device(device).type
    if x.device.type == "cpu" and kind in ("cuda", "meta"):
        return (x.pin_memory() if kind == "cuda" else x).to(device, non_blocking=True)
    return x.to(device)
