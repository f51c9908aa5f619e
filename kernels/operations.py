"""Operations around attention that have a Triton form beside a plain one: which runs on a tensor, and why.

Callers say what they want of a tensor; what decides is here, with a reason, as for the backends of `block_attention`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import Tensor

from dit_accel.kernels.triton_backend import is_interpreted, why_not_on

# Compares the Triton form with the plain one on a small case; returns what is wrong, in one clause, or None.
Check = Callable[[torch.device, torch.dtype], str | None]
_CHECKS: dict[str, Check] = {}
_FAULTS: dict[tuple[str, torch.device, torch.dtype], str | None] = {}
_LOG = logging.getLogger(__name__)


def register_operation(name: str, check: Check) -> None:
    """Enter an operation; `check` runs on its first use per device and dtype, and bars the Triton form there."""
    _CHECKS[name] = check
    for key in [key for key in _FAULTS if key[0] == name]:
        del _FAULTS[key]


def uses_triton(name: str, x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether the operation `name` runs in Triton on tensors like x, or on such of another dtype."""
    if x.device.type == "cpu" and not is_interpreted():
        return False  # the answer of `why_not`, without its search for the package at every call
    return why_not(name, x.device, dtype or x.dtype) is None


def why_not(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why an operation runs in plain torch on this device and dtype; None where it runs in Triton."""
    reason = why_not_on(device, dtype)
    if reason is not None:
        return reason
    key = (name, device, dtype)
    if key not in _FAULTS:
        _FAULTS[key] = _fault(name, device, dtype)
    return _FAULTS[key]


def operations(device: torch.device, dtype: torch.dtype) -> dict[str, str | None]:
    """For each operation: None where it runs in Triton on this device and dtype, else the reason why not."""
    return {name: why_not(name, device, dtype) for name in sorted(_CHECKS)}


def _fault(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    try:
        fault = _CHECKS[name](device, dtype)
    except torch.OutOfMemoryError:  # It says nothing about the kernel; the next call tests it again.
        raise
    except Exception as error:  # Any failure, in a compiler or a driver, means the same: not usable here.
        fault = f"{type(error).__name__}: {error}".splitlines()[0]
    if fault is None:
        return None
    fault = f"the self-test of {name!r} failed on {device}: {fault}"
    _LOG.warning("%s; plain torch computes it, slower", fault)
    return fault
