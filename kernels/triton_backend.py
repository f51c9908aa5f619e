"""The `triton` backend: which launches make up a call, and what the backend declines. Triton is imported on first use.

Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from dit_accel.kernels.merge import merge
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import AttentionCall, Precision
from dit_accel.kernels.triton_configs import FROM_FP8, MAX_HEAD_DIM, NO_SKIP, architecture, pad_head_dim
from dit_accel.kernels.triton_fp8 import Fp8Values
from dit_accel.kernels.triton_int8 import Int8Operands
from dit_accel.kernels.triton_launch import launch, prepare
from dit_accel.kernels.triton_mixed import add_mixed_first_order

# Summaries that differ for every query block are made for a few heads at a time, in so many bytes.
_LARGEST_TEMPORARY = 1 << 30


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    if call.kv_len is not None:
        call = replace(call, kv_len=call.kv_len.to(torch.int32))
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(q):
        slices = list(_groups_of_heads(q, call))
        if len(slices) == 1:
            return _attend(q, k, v, call)
        out, lse = torch.empty_like(q), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
        for heads in slices:
            part = _attend(q[:, heads], k[:, heads], v[:, heads], _of_heads(call, heads))
            out[:, heads], lse[:, heads] = part
        return out, lse


def _groups_of_heads(q: Tensor, call: AttentionCall) -> Iterator[slice]:
    """Heads that are computed together, so that what is made for every pair of blocks stays small."""
    heads, step = q.shape[1], q.shape[1]
    if call.remainder is not None and (call.remainder.about == "query" or call.remainder.first_order == "mixed"):
        width, rows, blocks = pad_head_dim(q.shape[-1]), call.plan.q_blocks.count, call.plan.k_blocks.count
        numbers = rows * blocks * width if call.remainder.about == "query" else 0
        # Moments are summed in fp32 first.
        numbers += width * width * (rows + 3 * blocks) if call.remainder.first_order == "mixed" else 0
        step = max(1, _LARGEST_TEMPORARY // (numbers * q.shape[0] * q.element_size()))
    for first in range(0, heads, step):
        yield slice(first, min(first + step, heads))


def _of_heads(call: AttentionCall, heads: slice) -> AttentionCall:
    """The call for some heads; what all heads share stays as it is."""

    def cut(x: Tensor) -> Tensor:
        return x if x.shape[1] == 1 else x[:, heads]

    plan, box = call.plan, call.plan.predicate
    if box is not None and not box.is_shared:
        box = replace(box, lower=cut(box.lower), upper=cut(box.upper), coordinates=cut(box.coordinates))
    full = None if plan.full_counts is None else cut(plan.full_counts)
    part = replace(plan, indices=cut(plan.indices), counts=cut(plan.counts), full_counts=full, predicate=box)
    return replace(call, plan=part)


def _attend(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """Exact part and remainder in one launch where they share arithmetic, else apart and merged."""
    precision = call.precision or Precision()
    if call.remainder is None:
        return _exact(q, k, v, call, precision)
    together = precision.qk == precision.pv == "input" and precision.skip is None
    is_mixed = call.remainder.first_order == "mixed"
    kind = torch.float32 if is_mixed else q.dtype
    # Summaries are neither quantised nor skipped.
    plain = replace(call, precision=None)
    prepared = prepare(q, k, v, plain)
    out, lse = launch(q, k, v, plain, prepared, only_rest=not together, dtype=kind)
    if not together:
        exact = _exact(q, k, v, replace(call, remainder=None), precision)
        # First-order terms that the kernel adds are linear in the weights, so that merging scales them rightly.
        out, lse = merge([out, exact[0]], [lse, exact[1]])
    if is_mixed:
        assert prepared.rest is not None
        out = add_mixed_first_order(q, out, lse, plain, prepared.rest)
    return out, lse


def _exact(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, precision: Precision) -> tuple[Tensor, Tensor]:
    """The selected blocks alone."""
    fp8 = Fp8Values.of(v, call.plan, call.kv_len) if precision.pv == "fp8" else None
    if precision.qk == "input":
        return launch(q, k, v, call, prepare(q, k, v, call), fp8=fp8)
    operands = Int8Operands.of(q, k, call.plan, call.scale, precision.smooth_k, call.kv_len)
    q, k = operands.q, operands.k
    out, lse = launch(q, k, v, call, prepare(q, k, v, call), int8=operands, fp8=fp8)
    if operands.offset is not None:
        lse += operands.offset
    return out, lse


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(request: Request) -> str | None:
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim {request.head_dim} is above {MAX_HEAD_DIM}"
    if request.remainder is not None and request.remainder.first_order == "block":
        return "a first-order term per block costs as much as dense attention; 'mixed', 'grouped' and 'global' do not"
    reason = why_not_on(request.device, request.dtype)
    if reason is not None or request.precision is None:
        return reason
    if request.precision.pv == "fp8":
        reason = _why_no_fp8(request.device)
    if reason is None and request.precision.skip is not None:
        reason = _why_no_skip(request.device)
    return reason


def why_not_on(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why no Triton kernel of this package runs on this device and dtype; None where they do."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {dtype} is not one of float16, bfloat16, float32"
    if is_interpreted():
        if device.type != "cpu":
            return f"TRITON_INTERPRET=1 computes on the CPU, the tensors are on {device.type}"
        # Its dot product multiplies the bit patterns.
        return "the interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type}"
    if torch.version.cuda is None:
        return "this build of torch is not for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if architecture(capability) is None:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


def _why_no_fp8(device: torch.device) -> str | None:
    if is_interpreted():
        return "the interpreter rounds to float8_e4m3fn wrongly"  # where the mantissa overflows (Triton 3.6)
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < FROM_FP8:
        return f"compute capability {major}.{minor} multiplies nothing in float8_e4m3fn, 8.9 does; 'int8' runs on both"
    return None


def _why_no_skip(device: torch.device) -> str | None:
    if device.type == "cuda" and architecture(torch.cuda.get_device_capability(device)) == NO_SKIP:
        return "Triton's compiler fails on products that may be skipped for compute capability 10.x"
    return None


BACKEND = Backend("triton", run, _why_not, priority=10, break_even=0.65)
