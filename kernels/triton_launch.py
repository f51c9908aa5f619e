"""One launch of the Triton attention kernel: what it reads, its strides and numbers, and the tile that serves the call.

Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.spec import AttentionCall, Remainder
from dit_accel.kernels.triton_configs import Features, Tile, architecture, choose_tile, constants_of
from dit_accel.kernels.triton_fp8 import Fp8Values
from dit_accel.kernels.triton_int8 import Int8Operands
from dit_accel.kernels.triton_rest import Rest, about_queries
from dit_accel.plan import BlockPlan, BoxPredicate

# The interpreter has no architecture of its own; it takes the tiles of this one.
_INTERPRETED_AS = 90
_LOG2_E = 1.4426950408889634
_FIRST_ORDER = {"none": 0, "mixed": 0, "global": 1, "grouped": 2}


_forced: Tile | None = None


@contextmanager
def served_by(tile: Tile) -> Iterator[None]:
    """Every launch inside takes `tile`, whatever the table would choose: for checks and timings of one tile."""
    global _forced
    _forced = tile
    try:
        yield
    finally:
        _forced = None


@dataclass(frozen=True)
class Prepared:
    """What a launch needs to know before it runs.

    Args:
        features: what the call asks of the kernel.
        tile: the shape that serves it.
        rest: the blocks that were not selected; None where they are dropped.
    """

    features: Features
    tile: Tile
    rest: Rest | None


def prepare(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Prepared:
    """Choose the tile and gather statistics of the rest; q, k, v `[B, H, N, D]`, q and k perhaps in INT8."""
    plan, remainder = call.plan, call.remainder
    features = features_of(q, k, v, call)
    tile = _forced or choose_tile(_architecture(q.device), features, plan.q_blocks.size, plan.k_blocks.size)
    if remainder is None:
        return Prepared(features, tile, None)
    rest = Rest.of(k, v, plan, remainder, call.kv_len, tile.block_n if tile.tma else 0)
    if remainder.about == "query":
        rest = about_queries(rest, q, k, v, plan, call.kv_len, call.scale)
    return Prepared(features, tile, rest)


def launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    call: AttentionCall,
    prepared: Prepared,
    int8: Int8Operands | None = None,
    fp8: Fp8Values | None = None,
    only_rest: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Exact and summary tiles in one softmax; a "mixed" first-order term is no part of it.

    Args:
        q, k, v: `[B, H, N, D]`; q and k in INT8 where `int8` gives their scales.
        call: plan, scale, remainder and lengths.
        prepared: for these tensors and this call.
        int8: scales of quantised queries and keys; without a remainder.
        fp8: quantised values, read in place of v; without a remainder.
        only_rest: compute no selected block.
        dtype: of the output. Default: that of v.

    Returns:
        Output `[B, H, Nq, D]`, and log-sum-exp fp32 `[B, H, Nq]`.
    """
    from dit_accel.kernels.triton_attention import attention

    plan, tile, rest = call.plan, prepared.tile, prepared.rest
    if rest is not None and rest.k is not None and rest.v is not None:
        k, v = rest.k, rest.v
    out = torch.empty_like(q, dtype=v.dtype if dtype is None else dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    arguments = _tensors(q, k, v, out, lse, plan, call.kv_len, rest, int8) | _strides(q, k, v, out, plan)
    if fp8 is not None:
        arguments |= {"v": fp8.v, "v_step": fp8.step, "v_mean": fp8.mean}
        arguments |= dict(zip(("v_b", "v_h", "v_n"), (*fp8.v.stride()[:2], fp8.v.shape[-1]), strict=True))
    if only_rest:
        arguments["counts"] = torch.zeros_like(plan.counts)
    arguments |= _numbers(q, plan, tile, rest) | {"scale": call.scale, "skip": _skip(call)}
    arguments |= constants_of(prepared.features, tile, plan.k_blocks.size)
    if tile.tma:
        _lend_memory()
    grid = (plan.q_blocks.count * arguments["q_tiles"], q.shape[1], q.shape[0])
    attention[grid](**arguments, num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers)
    return out, lse


def features_of(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> Features:
    """What a call asks of the kernel; q, k, v `[B, H, N, D]`."""
    remainder, predicate = call.remainder, call.plan.predicate
    return Features(
        head_dim=q.shape[-1],
        dtype=v.dtype,
        uniform=call.plan.k_blocks.is_uniform,
        has_length=call.kv_len is not None,
        stride=() if predicate is None else predicate.stride,
        ball=predicate is not None and predicate.ball is not None,
        int8=q.dtype == torch.int8,
        fp8=call.precision is not None and call.precision.pv == "fp8",
        rest=_kind_of_rest(remainder),
        first_order=0 if remainder is None else _FIRST_ORDER[remainder.first_order],
        skip=call.precision is not None and call.precision.skip is not None,
        aligned=all(_is_aligned(x) for x in (q, k, v)),
    )


def _kind_of_rest(remainder: Remainder | None) -> int:
    if remainder is None:
        return 0
    if remainder.about == "query":
        return 3
    return 2 if remainder.mass == "diagonal" else 1


def _skip(call: AttentionCall) -> float:
    """How far below the running maximum a tile is left out, in units of log 2."""
    if call.precision is None or call.precision.skip is None:
        return 0.0
    return -call.precision.skip * _LOG2_E


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
    names = ("chosen", "log_tokens", "mean_k", "mean_v", "variance", "moments", "bias", "centres")
    return {name: None if rest is None else getattr(rest, name) for name in names} | {
        "q_step": None if int8 is None else int8.q_step,
        "k_step": None if int8 is None else int8.k_step,
        "v_step": None,
        "v_mean": None,
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
