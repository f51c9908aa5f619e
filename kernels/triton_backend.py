"""The `triton` backend: prepares what the kernel reads and launches it. Triton is imported on first use."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.merge import merge
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import Precision, Remainder
from dit_accel.kernels.triton_configs import MAX_HEAD_DIM, Features, Tile, architecture, choose_tile, constants_of
from dit_accel.kernels.triton_operands import Int8Operands, Rest
from dit_accel.plan import BlockPlan, BoxPredicate

# The interpreter has no architecture of its own; it takes the tiles of this one.
_INTERPRETED_AS = 90
_REST = {"mean": 1, "diagonal": 2}
_FIRST_ORDER = {"none": 0, "global": 1, "grouped": 2}


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    remainder: Remainder | None,
    precision: Precision | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`."""
    # Triton launches on the current device, wherever the tensors are.
    with torch.cuda.device_of(q):
        return _run(q, k, v, plan, scale, remainder, precision, kv_len)


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    remainder: Remainder | None,
    precision: Precision | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    kv_len = None if kv_len is None else kv_len.to(torch.int32)
    if precision is None or precision.qk == "input":
        return launch(q, k, v, plan, scale, kv_len, remainder)
    operands = Int8Operands.of(q, k, plan, scale, precision.smooth_k, kv_len)
    out, lse = launch(operands.q, operands.k, v, plan, scale, kv_len, int8=operands)
    if operands.offset is not None:
        lse += operands.offset
    if remainder is None:
        return out, lse
    # Summaries are not quantised: they are computed without any exact block and merged, first-order term and all.
    rest = launch(q, k, v, plan, scale, kv_len, remainder, only_rest=True)
    return merge([out, rest[0]], [lse, rest[1]])


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    scale: float,
    kv_len: Tensor | None,
    remainder: Remainder | None = None,
    int8: Int8Operands | None = None,
    only_rest: bool = False,
) -> tuple[Tensor, Tensor]:
    """One launch of the attention kernel.

    Args:
        q, k, v: `[B, H, N, D]`; q and k in INT8 where `int8` gives their scales.
        plan: what is selected.
        scale: factor on the logits.
        kv_len: int32 `[B]`, real keys per item.
        remainder: what becomes of the rest; not with `int8`.
        int8: scales of quantised operands.
        only_rest: compute no selected block.

    Returns:
        Output `[B, H, Nq, D]` in the dtype of v, and log-sum-exp fp32 `[B, H, Nq]`.
    """
    from dit_accel.kernels.triton_attention import attention

    features = _features(q, k, v, plan, kv_len, remainder)
    tile = choose_tile(_architecture(q.device), features, plan.q_blocks.size, plan.k_blocks.size)
    rest = None if remainder is None else Rest.of(k, v, plan, remainder, kv_len, tile.block_n if tile.tma else 0)
    if rest is not None and rest.k is not None and rest.v is not None:
        k, v = rest.k, rest.v
    out, lse = torch.empty_like(q, dtype=v.dtype), torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments = _tensors(q, k, v, out, lse, plan, kv_len, rest, int8) | _strides(q, k, v, out, plan)
    if only_rest:
        arguments["counts"] = torch.zeros_like(plan.counts)
    arguments |= _numbers(q, plan, tile, rest) | {"scale": scale} | constants_of(features, tile, plan.k_blocks.size)
    if tile.tma:
        _lend_memory()
    grid = (plan.q_blocks.count * arguments["q_tiles"], q.shape[1], q.shape[0])
    attention[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages)
    return out, lse


def _features(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kv_len: Tensor | None, remainder: Remainder | None
) -> Features:
    return Features(
        head_dim=q.shape[-1],
        dtype=v.dtype,
        uniform=plan.k_blocks.is_uniform,
        has_length=kv_len is not None,
        stride=() if plan.predicate is None else plan.predicate.stride,
        ball=plan.predicate is not None and plan.predicate.ball is not None,
        int8=q.dtype == torch.int8,
        rest=0 if remainder is None else _REST[remainder.mass],
        first_order=0 if remainder is None else _FIRST_ORDER[remainder.first_order],
        aligned=all(_is_aligned(x) for x in (q, k, v)),
    )


def _is_aligned(x: Tensor) -> bool:
    """Whether rows of x `[B, H, N, D]` begin at multiples of 16 bytes, as tensor descriptors need."""
    size = x.element_size()
    return x.data_ptr() % 16 == 0 and all(stride * size % 16 == 0 for stride in (*x.stride()[:3], x.shape[-1]))


def _tensors(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: BlockPlan,
    kv_len: Tensor | None,
    rest: Rest | None,
    int8: Int8Operands | None,
) -> dict[str, Any]:
    """Every pointer of the kernel; None where the features leave it unread."""
    q_starts, q_lengths = plan.q_blocks.on(q.device)
    k_starts, k_lengths = plan.k_blocks.on(q.device)
    box = plan.predicate
    names = ("chosen", "log_tokens", "mean_k", "mean_v", "variance", "moments")
    return {name: None if rest is None else getattr(rest, name) for name in names} | {
        "q_step": None if int8 is None else int8.q_step,
        "k_step": None if int8 is None else int8.k_step,
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "lse": lse,
        "indices": plan.indices.contiguous(),
        "counts": plan.counts.contiguous(),
        "full_counts": None if plan.full_counts is None else plan.full_counts.contiguous(),
        "q_starts": q_starts,
        "q_lengths": q_lengths,
        "k_starts": k_starts,
        "k_lengths": k_lengths,
        "kv_len": kv_len,
        "lower": None if box is None else box.lower.contiguous(),
        "upper": None if box is None else box.upper.contiguous(),
        "coordinates": None if box is None else box.coordinates.contiguous(),
        "ball": None if box is None else box.ball,
    }


def _strides(q: Tensor, k: Tensor, v: Tensor, out: Tensor, plan: BlockPlan) -> dict[str, int]:
    """Strides of `[B, H, N, D]` tensors; 0 along the axes that a plan shares."""
    strides: dict[str, int] = {}
    for name, x in (("q", q), ("k", k), ("v", v), ("out", out)):
        strides |= {f"{name}_{axis}": step for axis, step in zip("bhn", x.stride(), strict=False)}
    batch, heads, rows, wide = plan.indices.shape
    steps = {
        "index_b": heads * rows * wide,
        "index_h": rows * wide,
        "count_b": heads * rows,
        "count_h": rows,
        "chosen_b": heads * rows * plan.k_blocks.count,
        "chosen_h": rows * plan.k_blocks.count,
    }
    shared = {"b": batch == 1, "h": heads == 1}
    strides |= {name: 0 if shared[name[-1]] else step for name, step in steps.items()}
    return strides | {"index_n": wide} | _box_strides(plan.predicate)


def _box_strides(box: BoxPredicate | None) -> dict[str, int]:
    """Strides of the boxes of queries and of the places of keys over batch and heads; 0 where they are shared."""
    strides: dict[str, int] = {}
    for name, x in (("box", None if box is None else box.lower), ("place", None if box is None else box.coordinates)):
        batch, heads = (1, 1) if x is None or x.ndim == 2 else x.shape[:2]
        size = 0 if x is None else x.shape[-2] * x.shape[-1]
        strides |= {f"{name}_b": size * heads if batch > 1 else 0, f"{name}_h": size if heads > 1 else 0}
    return strides


def _numbers(q: Tensor, plan: BlockPlan, tile: Tile, rest: Rest | None) -> dict[str, int]:
    """Lengths and counts; the kernel is specialised on none of them."""
    return {
        "q_tiles": -(-plan.q_blocks.size // tile.block_m),
        "k_tiles": -(-plan.k_blocks.size // tile.block_n),
        "k_size": plan.k_blocks.size,
        "queries": q.shape[2],
        "keys": plan.k_blocks.tokens,
        "blocks": plan.k_blocks.count,
        "group": 1 if rest is None else rest.group,
        "padded_keys": 0 if rest is None else rest.padded_keys,
    }


def _lend_memory() -> None:
    """Give Triton an allocator for the tensor descriptors that the kernel makes on the device."""
    import triton

    def allocate(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty(size, dtype=torch.int8, device="cuda")

    triton.set_allocator(allocate)


def _architecture(device: torch.device) -> int:
    arch = architecture(torch.cuda.get_device_capability(device)) if device.type == "cuda" else _INTERPRETED_AS
    assert arch is not None, "why_not admits no older device"
    return arch


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not(request: Request) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install triton)"
    if request.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"dtype {request.dtype} is not one of float16, bfloat16, float32"
    if request.head_dim > MAX_HEAD_DIM:
        return f"head_dim {request.head_dim} is above {MAX_HEAD_DIM}"
    if request.remainder is not None and request.remainder.first_order in ("block", "mixed"):
        return "a first-order term per block needs a D x D matrix of every block; 'grouped' and 'global' do not"
    if request.remainder is not None and request.remainder.about == "query":
        return "about the mean query a block has other summaries for each query block, and its tiles share them"
    return _why_not_here(request)


def _why_not_here(request: Request) -> str | None:
    """The reason that lies in the device, if any."""
    if is_interpreted():
        if request.device.type != "cpu":
            return f"TRITON_INTERPRET=1 computes on the CPU, the tensors are on {request.device.type}"
        # Its dot product multiplies the bit patterns.
        return "the interpreter computes bfloat16 wrongly" if request.dtype == torch.bfloat16 else None
    if request.device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {request.device.type}"
    if torch.version.cuda is None:
        return "this build of torch is not for CUDA"
    capability = torch.cuda.get_device_capability(request.device)
    if architecture(capability) is None:
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None


BACKEND = Backend("triton", run, _why_not, priority=10, break_even=0.65)
