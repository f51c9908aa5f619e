"""Products of fp32 matrices on a CPU, by the library that is faster there: oneDNN or the one behind `torch.matmul`.

MKL, behind `torch.matmul` on x86, leaves half of the vectors of AMD processors with AVX-512 unused; oneDNN uses all
of it. PyTorch gives it fp32 products where it may use bfloat16 for them, which it does with matrix units alone (AMX,
or those of some ARM processors). Where a check finds that nothing is rounded, the permission changes the library only.
Intel's own processors have their full width in both libraries, and elsewhere `torch.matmul` does not run MKL.

`DIT_ACCEL_CPU_PRODUCTS`, read once per process, pins the choice: "onednn" or "blas"; "auto", the default, is the above.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ConfigError

# Its attributes are made when it is imported, where a type checker does not see them.
_MKLDNN: Any = torch.backends.mkldnn

SETTING = "DIT_ACCEL_CPU_PRODUCTS"

# Multiplications per thread from which oneDNN pays: a call takes 10 µs more.
_LARGE = 2**20


class KeyMatrix:
    """Keys that several groups of rows are multiplied with. No gradient passes, and nothing is rounded below fp32.

    Args:
        keys: `[..., N, K]`.
        bias: what is added to every row of the products, `[..., 1, N]`; axes of size 1 are shared. Default: nothing.
    """

    def __init__(self, keys: Tensor, bias: Tensor | None = None) -> None:
        # Rows that stand close are multiplied fastest.
        self._keys = keys.detach().contiguous()
        self._bias = None if bias is None else bias.detach()

    def times(self, rows: Tensor) -> Tensor:
        """`rows @ keysᵀ + bias`, `[..., M, N]`, for rows `[..., M, K]` with the leading axes of the keys."""
        rows = rows.detach()
        if rows.numel() * self._keys.shape[-2] < _LARGE * torch.get_num_threads():
            out = rows @ self._keys.mT
        else:
            with wide_products(rows.device):
                out = rows @ self._keys.mT
        return out if self._bias is None else out.add_(self._bias)


class _Permission:
    """The switch in PyTorch, which all threads share: on from the first `with` to enter until the last one leaves."""

    def __init__(self) -> None:
        self._lock, self._entered, self._before = Lock(), 0, ""

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._before = _MKLDNN.matmul.fp32_precision
                _MKLDNN.matmul.fp32_precision = "bf16"
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                _MKLDNN.matmul.fp32_precision = self._before


_PERMISSION = _Permission()


@contextmanager
def wide_products(device: torch.device) -> Iterator[None]:
    """Products of fp32 matrices on `device` made inside are oneDNN's where `are_wide` says so; nothing is rounded."""
    if not are_wide(device):
        yield
        return
    with _PERMISSION:
        yield


def are_wide(device: torch.device) -> bool:
    """Whether products on `device` made inside `wide_products` are faster than others."""
    return device.type == "cpu" and bool(_MKLDNN.enabled) and library() == "onednn"


def is_bfloat16_fast(device: torch.device) -> bool:
    """Whether products of bfloat16 matrices on `device` are faster than those of fp32 inside `wide_products`."""
    return are_wide(device) and bool(_facts().get("avx512_bf16"))


@cache
def library() -> str:
    """The library for large fp32 products on this CPU, "onednn" or "blas"; the same throughout a process.

    Raises:
        ConfigError: the setting holds another word, or "onednn" where that is not there or rounds.
    """
    wanted = os.environ.get(SETTING, "auto")
    if wanted not in ("auto", "onednn", "blas"):
        raise ConfigError(SETTING, f"expected 'auto', 'onednn' or 'blas', got {wanted!r}")
    if wanted == "blas" or (wanted == "auto" and not _is_mkl_on_wide_amd()):
        return "blas"
    if _is_exact():
        return "onednn"
    if wanted == "onednn":
        raise ConfigError(SETTING, "oneDNN is missing here or rounds fp32 products to bfloat16; use 'auto' or 'blas'")
    return "blas"


def _is_mkl_on_wide_amd() -> bool:
    facts = _facts()
    is_amd = str(facts.get("cpu_name", "")).startswith("AMD")
    return is_amd and bool(facts.get("avx512_f")) and torch.backends.mkl.is_available()


@cache
def _facts() -> dict[str, object]:
    """What torch says about the CPU; nothing before version 2.10."""
    return dict(getattr(torch.cpu, "get_capabilities", dict)())


def _is_exact() -> bool:
    """Whether oneDNN is there and multiplies fp32 matrices without rounding them."""
    if not _MKLDNN.is_available() or not hasattr(_MKLDNN, "matmul"):
        return False
    # 13 bits of mantissa: bfloat16 keeps 8 of them, TF32 11. The sums are exact in fp32.
    rows, ones = torch.full((2, 64, 128), 1 + 2**-12), torch.ones(2, 128, 256)
    with torch.no_grad(), _PERMISSION:
        products = (torch.bmm(rows, ones), torch.mm(rows[0], ones[0]))
    return all(bool((x == 128 + 2**-5).all()) for x in products)
