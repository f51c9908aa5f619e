"""The test a backend passes on its first use: one small case against plain PyTorch, on the device it will run on."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels import torch_backend
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import AttentionCall
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate

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

    Raises:
        torch.OutOfMemoryError: that says nothing about the backend.
    """
    q, k, v, plan, kv_len = _case(request)
    call = AttentionCall(plan, request.head_dim**-0.5, request.remainder, request.precision, kv_len)
    exact = torch.float64 if request.dtype == torch.float64 else torch.float32
    expected = torch_backend.run(q.to(exact), k.to(exact), v.to(exact), call)
    try:
        got = backend.run(q, k, v, call)
        return _difference(got, expected, request.dtype)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # Any failure, in a compiler or a driver, means the same: not usable here.
        return f"its self-test failed on {request.device.type}: {type(error).__name__}: {error}".splitlines()[0]


def _case(request: Request) -> tuple[Tensor, Tensor, Tensor, BlockPlan, Tensor]:
    """Two items of two heads, short blocks, rows of different length, one item with fewer real keys."""
    generator = torch.Generator().manual_seed(0)
    q_blocks, k_blocks = _blocks(request.q_size, request, _BLOCKS - 1), _blocks(request.k_size, request, _BLOCKS)
    mask = torch.rand(2, 2, q_blocks.count, k_blocks.count, generator=generator) < 0.5
    mask[..., 0] = True
    q, k, v = (
        torch.randn(2, 2, blocks.tokens, request.head_dim, generator=generator).to(request.device, request.dtype)
        for blocks in (q_blocks, k_blocks, k_blocks)
    )
    plan = BlockPlan.from_mask(mask, q_blocks, k_blocks)
    if request.has_predicate:
        plan = with_window(plan, request.has_ball)
    kv_len = torch.tensor([k_blocks.tokens, k_blocks.tokens - request.k_size], device=request.device)
    return q, k, v, plan.to(request.device), kv_len


def _blocks(size: int, request: Request, count: int) -> Blocking:
    """`count` blocks and a short one; with ragged blocks, a short one in between too."""
    short = max(1, size // 3)
    if request.is_uniform:
        return Blocking.uniform(count * size + short, size)
    return Blocking.from_lengths([size, short, *[size] * (count - 1), short])


def with_window(plan: BlockPlan, has_ball: bool) -> BlockPlan:
    """The same blocks, half of each row whole, the others cut by a box of three axes, or the ball inside it."""
    keys, queries = (torch.arange(n, dtype=torch.int32) for n in (plan.k_blocks.tokens, plan.q_blocks.tokens))
    coordinates, centre = (torch.stack([x // 12, x // 4 % 3, x % 4], -1) for x in (keys, queries))
    reach = torch.tensor([plan.k_blocks.size // 12 + 1, 1, 2], dtype=torch.int32)
    ball = torch.tensor([1.0, 1.0, 1.0, 4 * 2.5**2]) if has_ball else None
    box = BoxPredicate(centre - reach, centre + reach + 1, coordinates, ball=ball)
    return replace(plan, full_counts=(plan.counts // 2).clamp(min=1), predicate=box)


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
