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

_SMALL_GRID = (3, 13, 11)  # no multiple of any block or tile
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}


def verify(method: Method, shape: Shape, options: Options) -> float:
    """Largest error of the method's attention on a small case, against the float64 specification of its own plan.

    The same backend, dtype and head size are used as in the timed call, and the same text position.

    Raises:
        DitAccelError: the error is more than rounding, or the method cannot run.
    """
    text = min(shape.layout.text, 19)
    layout = TokenLayout(_SMALL_GRID, text, shape.layout.text_position)
    raster = structured_qkv(layout, 2, shape.head_dim, options.device, options.dtype, options.seed)
    q, k, v = raster
    outs = []
    for name, dtype in ((options.backend, options.dtype), ("reference", torch.float64)):
        # A call of its own for each, since a method may keep what it computed.
        call = CallContext(layout, seed=options.seed)
        order, plan = method.plan(layout, *raster, call)
        q, k, v = raster if order is None else order.to(options.device).apply(*raster)
        backend = choose_backend(name, request_for(method, q, plan)).name
        outs.append(method.compute(q.to(dtype), k.to(dtype), v.to(dtype), plan, call, backend=backend).double())
    error = float((outs[0] - outs[1]).abs().max() / outs[1].abs().max())
    whole = block_attention(q, k, v, BlockPlan.full(plan.q_blocks, plan.k_blocks, q.device), backend=options.backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = max(error, float((whole.double() - dense).abs().max() / dense.abs().max()))
    return _checked(error, options)


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
    return _checked(float((out - right).abs().max() / right.abs().max()), options)


def _checked(error: float, options: Options) -> float:
    if not error <= _TOLERANCE.get(options.dtype, 1e-6):
        raise DitAccelError(f"wrong: the small case is off by {error:.2g}")
    return error


def request_for(method: Method, q: Tensor, plan: BlockPlan) -> Request:
    """What `method` asks of a backend. q `[B, H, N, D]`."""
    return request_of(q, plan, method.remainder, method.completes, method.precision)
