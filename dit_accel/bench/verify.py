"""What is timed is first right: small cases against the float64 specification."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.bench.options import Options
from dit_accel.bench.shapes import Shape, structured_qkv
from dit_accel.errors import DitAccelError
from dit_accel.kernels import Precision, Remainder, block_attention
from dit_accel.kernels.attention import request_of
from dit_accel.kernels.registry import Request, choose_backend
from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext

if TYPE_CHECKING:
    from dit_accel.methods.base import Method

QKV = tuple[Tensor, Tensor, Tensor]
_SMALL_GRID = (3, 13, 11)  # no multiple of any block or tile
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def verify(method: Method, shape: Shape, options: Options) -> float:
    """Largest error of the method's attention on a small case, against the float64 specification of its own plan.

    The same backend, dtype and head size are used as in the timed call, and the same text position. A method that
    keeps something from step to step runs a second step, on the same tensors and on others: the former shows what it
    kept, the latter what it computes.

    Raises:
        DitAccelError: the error is more than rounding, or the method cannot run.
    """
    text = min(shape.layout.text, 19)
    layout = TokenLayout(_SMALL_GRID, text, shape.layout.text_position)
    first, other = (
        structured_qkv(layout, 2, shape.head_dim, options.device, options.dtype, options.seed + more) for more in (0, 1)
    )
    runs: list[list[QKV]] = [[first]] if method.cycle == 1 else [[first, first], [first, other]]
    return _checked(max(_error_of_steps(method, layout, tensors, options) for tensors in runs), options)


def _error_of_steps(method: Method, layout: TokenLayout, tensors: list[QKV], options: Options) -> float:
    """Largest error over steps with these q, k, v each, and of the kernel at full density."""
    error, was_whole = 0.0, False
    # A call of its own for each, since a method may keep what it computed.
    calls = [CallContext(layout, seed=options.seed) for _ in range(2)]
    for step, raster in enumerate(tensors):
        outs = []
        for call, name, dtype in zip(
            calls, (options.backend, "reference"), (options.dtype, torch.float64), strict=True
        ):
            call.step, call.extra_density = step, 0.0
            order, plan = method.plan(layout, *raster, call)
            q, k, v = raster if order is None else order.to(options.device).apply(*raster)
            backend = choose_backend(name, request_for(method, q, plan)).name
            outs.append(method.compute(q.to(dtype), k.to(dtype), v.to(dtype), plan, call, backend=backend))
        error = max(error, _off(outs[0], outs[1]))
        dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
        whole = BlockPlan.full(plan.q_blocks, plan.k_blocks, q.device)
        error = max(error, _off(block_attention(q, k, v, whole, backend=options.backend), dense))
        was_whole |= calls[0].extra_density >= 1
        # What all keys gave is right for as long as the tensors stay as they are.
        if was_whole and raster is tensors[0]:
            error = max(error, _off(outs[0], dense))
    return error


def _off(out: Tensor, right: Tensor) -> float:
    """Largest error of `out`, in units of the largest number of `right`."""
    return float((out.double() - right.double()).abs().max() / right.double().abs().max())


def verify_kernel(
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: BlockPlan,
    remainder: Remainder | None,
    precision: Precision | None,
    options: Options,
) -> float:
    """Largest error of `block_attention` on a small call, against the float64 specification.

    Args:
        qkv: `[B, H, N, D]`, small enough for a table of all scores.
        plan: of that call.
        remainder, precision: as in `block_attention`.
        options: the backend that is to be timed.

    Raises:
        DitAccelError: the error is more than rounding, or the backend cannot run.
    """
    out = block_attention(*qkv, plan, remainder=remainder, precision=precision, backend=options.backend).double()
    q, k, v = (x.double() for x in qkv)
    right = block_attention(q, k, v, plan, remainder=remainder, precision=precision, backend="reference")
    return _checked(_off(out, right), options)


def _checked(error: float, options: Options) -> float:
    if not error <= _TOLERANCE.get(options.dtype, 1e-6):
        raise DitAccelError(f"wrong: the small case is off by {error:.2g}")
    return error


def request_for(method: Method, q: Tensor, plan: BlockPlan) -> Request:
    """What `method` asks of a backend. q `[B, H, N, D]`."""
    return request_of(q, plan, method.remainder, method.completes, method.precision)
