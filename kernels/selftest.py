"""The test a backend passes on its first use: one small case against plain PyTorch, on the device it will run on."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels import torch_backend
from dit_accel.kernels.registry import Backend, Request
from dit_accel.plan import Blocking, BlockPlan

# Largest accepted difference: the rounding of inputs and weights, far below what a wrong block or mask causes.
_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 5e-3, torch.float64: 1e-6}
_BLOCKS = 4


def fault_of(backend: Backend, request: Request) -> str | None:
    """Run `backend` on a small case like `request` and compare with the torch backend.

    Args:
        backend: what to test.
        request: device, dtype, head size, block sizes, remainder and precision to test with.

    Returns:
        None when output and log-sum-exp agree, else what went wrong, in one clause.
    """
    q, k, v, plan, kv_len = _case(request)
    options = {"scale": request.head_dim**-0.5, "remainder": request.remainder, "precision": request.precision}
    exact = torch.float64 if request.dtype == torch.float64 else torch.float32
    expected = torch_backend.run(q.to(exact), k.to(exact), v.to(exact), plan, kv_len=kv_len, **options)
    try:
        got = backend.run(q, k, v, plan, kv_len=kv_len, **options)
        return _difference(got, expected, request.dtype)
    except Exception as error:  # Any failure, in a compiler or a driver, means the same: not usable here.
        return f"its self-test failed on {request.device.type}: {type(error).__name__}: {error}".splitlines()[0]


def _case(request: Request) -> tuple[Tensor, Tensor, Tensor, BlockPlan, Tensor]:
    """Two items of two heads, a ragged tail in queries and keys, rows of different length, one shorter item."""
    generator = torch.Generator().manual_seed(0)
    q_blocks = Blocking.uniform((_BLOCKS - 1) * request.q_size + max(1, request.q_size // 3), request.q_size)
    k_blocks = Blocking.uniform(_BLOCKS * request.k_size + max(1, request.k_size // 2), request.k_size)
    mask = torch.rand(2, 2, q_blocks.count, k_blocks.count, generator=generator) < 0.5
    mask[..., 0] = True
    q, k, v = (
        torch.randn(2, 2, blocks.tokens, request.head_dim, generator=generator).to(request.device, request.dtype)
        for blocks in (q_blocks, k_blocks, k_blocks)
    )
    plan = BlockPlan.from_mask(mask, q_blocks, k_blocks).to(request.device)
    kv_len = torch.tensor([k_blocks.tokens, k_blocks.tokens - request.k_size], device=request.device)
    return q, k, v, plan, kv_len


def _difference(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], dtype: torch.dtype) -> str | None:
    """In words, what is wrong with `got` (output, log-sum-exp); None when nothing is."""
    limit = _TOLERANCE.get(dtype, 3e-2)
    for name, value, wanted in zip(("output", "log-sum-exp"), got, expected, strict=True):
        if value.shape != wanted.shape:
            return f"its self-test gave an {name} of shape {tuple(value.shape)} instead of {tuple(wanted.shape)}"
        error = float((value.double() - wanted.double()).abs().max())
        if not error <= limit:
            return f"its self-test {name} is off by {error:.2g} (at most {limit:g} is rounding)"
    return None
