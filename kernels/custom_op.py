"""`torch.ops.dit_accel.block_attention`: a call that `torch.compile` keeps in its graph as one opaque operator.

A plan travels as its tensors and sizes. Nothing in it is read while tracing, so neither counts nor lengths nor the
selected blocks lead to another compilation.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.spec import AttentionCall, Precision, Remainder
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate

_SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor indices, Tensor counts, Tensor? full_counts, "
    "Tensor? lower, Tensor? upper, Tensor? coordinates, int[] stride, Tensor? ball, "
    "Tensor q_starts, int q_size, Tensor k_starts, int k_size, Tensor? kv_len, float scale, "
    "str mass, str first_order, int group, str about, str qk, bool smooth_k, float? skip, str pv, str backend) "
    "-> (Tensor, Tensor)"
)
_NO_REST = "drop"


def enter(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, backend: str) -> tuple[Tensor, Tensor]:
    """Enter the operator: output `[B, H, Nq, D]` and log-sum-exp `[B, H, Nq]` for q, k, v `[B, H, N, D]`."""
    plan, remainder, precision = call.plan, call.remainder, call.precision or Precision()
    box = plan.predicate
    return torch.ops.dit_accel.block_attention(
        q,
        k,
        v,
        plan.indices,
        plan.counts,
        plan.full_counts,
        None if box is None else box.lower,
        None if box is None else box.upper,
        None if box is None else box.coordinates,
        [] if box is None else list(box.stride),
        None if box is None else box.ball,
        plan.q_blocks.starts,
        plan.q_blocks.size,
        plan.k_blocks.starts,
        plan.k_blocks.size,
        call.kv_len,
        call.scale,
        _NO_REST if remainder is None else remainder.mass,
        "none" if remainder is None else remainder.first_order,
        1 if remainder is None else remainder.group,
        "key" if remainder is None else remainder.about,
        precision.qk,
        precision.smooth_k,
        precision.skip,
        precision.pv,
        backend,
    )


@torch.library.custom_op("dit_accel::block_attention", mutates_args=(), schema=_SCHEMA)
def _block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    counts: Tensor,
    full_counts: Tensor | None,
    lower: Tensor | None,
    upper: Tensor | None,
    coordinates: Tensor | None,
    stride: list[int],
    ball: Tensor | None,
    q_starts: Tensor,
    q_size: int,
    k_starts: Tensor,
    k_size: int,
    kv_len: Tensor | None,
    scale: float,
    mass: Any,
    first_order: Any,
    group: int,
    about: Any,
    qk: Any,
    smooth_k: bool,
    skip: float | None,
    pv: Any,
    backend: str,
) -> tuple[Tensor, Tensor]:
    from dit_accel.kernels.attention import block_attention

    box = None
    if lower is not None and upper is not None and coordinates is not None:
        box = BoxPredicate(lower, upper, coordinates, tuple(stride), ball)
    q_blocks, k_blocks = _blocking(q_starts, q_size), _blocking(k_starts, k_size)
    out, lse = block_attention(
        q,
        k,
        v,
        BlockPlan(q_blocks, k_blocks, indices, counts, full_counts, box),
        scale=scale,
        remainder=None if mass == _NO_REST else Remainder(mass, first_order, group, about),
        precision=Precision(qk, smooth_k, skip, pv),
        kv_len=kv_len,
        return_lse=True,
        backend=backend,
    )
    # Results stand in memory as the fake promises.
    if out.stride() != torch.empty_like(q).stride():
        out = torch.empty_like(q).copy_(out)
    return out, lse.contiguous()


@_block_attention.register_fake
def _fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=kind)


def _blocking(starts: Tensor, size: int) -> Blocking:
    """The partition with these starts (int64, on the CPU), made once, so that its copy on the device is kept."""
    return _made(starts.numpy().tobytes(), size)


@lru_cache(maxsize=64)
def _made(starts: bytes, size: int) -> Blocking:
    return Blocking(torch.frombuffer(bytearray(starts), dtype=torch.int64), size)
