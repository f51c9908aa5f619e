"""What the study of the remainder runs: its methods, and one of them on one attention call.

`study_remainder.py` runs it, `remainder_report.py` writes what came out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from dit_accel.methods.base import Method
from dit_accel.methods.composed import Composed
from dit_accel.methods.registry import get_method
from dit_accel.order import TokenOrder
from dit_accel.samples.captured_attention import Call, clocked
from dit_accel.state import CallContext

DENSITIES = (0.0625, 0.125, 0.25, 0.5)
BAR_DENSITY = 0.125
DROP = "aurora, rest dropped"
EVERY_CALL = "aurora, sorted at every call"
_BLOCK = 64


@dataclass(frozen=True)
class Case:
    """A method as it runs in the study; `kind` is "published", "variant" (of a published method) or "ours"."""

    label: str
    method: str
    parameters: dict[str, Any] = field(default_factory=dict)
    kind: str = "published"


# Published rules that choose their own density are switched off: all methods keep the same share of blocks.
CASES = (
    Case("PISA", "pisa"),
    Case("PISA, covariance-aware", "pisa", {"score": "covariance"}),
    Case("PASA's grouped term", "pisa", {"first_order": "grouped"}),
    Case(
        "Sol-Attn's order and tail", "pisa", {"order": "morton", "remainder": "pooled", "keep_self": True, "reach": 1}
    ),
    Case("PISA, block-wise first order", "pisa", {"first_order": "block"}, "variant"),
    Case("PISA in boxes", "pisa", {"order": "bisect", "tile": [2, 4, 8]}, "variant"),
    Case("Rectified", "rectified", {"mass": None, "touching": False}),
    Case("SVG2", "svg2"),
    Case("SpargeAttn", "sparge"),
    Case("XAttention", "xattention"),
    Case("SubBlock", "subblock"),
    Case("DraftAttention", "draft", {"rounding": "floor"}),
    Case("PBS-Attn", "pbs", {"mass": None, "rounding": "floor"}),
    Case("LSH order, dropped", "pbs", {"mass": None, "order": "lsh", "block": 64, "rounding": "floor"}, "variant"),
    Case("aurora", "aurora", {}, "ours"),
    Case(DROP, "aurora", {"remainder": "drop"}, "ours"),
    Case(EVERY_CALL, "aurora", {"renew": 1, "across_branches": False}, "ours"),
    Case("aurora, 32 clusters", "aurora", {"clusters": 32}, "ours"),
    Case("aurora, query blocks of 64", "aurora", {"query_block": 64}, "ours"),
    Case("aurora, query blocks of 256", "aurora", {"query_block": 256}, "ours"),
    Case("aurora, key blocks of 32", "aurora", {"block": 32}, "ours"),
    Case("aurora, about the key", "aurora", {"about": "key"}, "ours"),
    Case("aurora, about the key, second-order mass", "aurora", {"about": "key", "second_order": True}, "ours"),
    Case(
        "aurora, about the key, global first order",
        "aurora",
        {"about": "key", "remainder": "taylor", "first_order": "global"},
        "ours",
    ),
    Case("aurora, mixed first order", "aurora", {"remainder": "taylor", "first_order": "mixed"}, "ours"),
    Case("aurora, a budget per layer", "aurora", {"scope": "layer"}, "ours"),
    Case("aurora, a budget per layer, predicted error", "aurora", {"scope": "layer", "score": "error"}, "ours"),
    Case("aurora in boxes 2x2x16", "aurora", {"order": "bisect", "tile": [2, 2, 16]}, "ours"),
    Case("aurora in boxes 4x4x4", "aurora", {"order": "bisect"}, "ours"),
    Case("aurora in the raster", "aurora", {"order": "raster"}, "ours"),
    Case(
        "boxes 2x2x16, mixed first order, predicted error",
        "aurora",
        {
            **{"order": "bisect", "tile": [2, 2, 16], "query_block": None, "score": "error", "scope": "layer"},
            **{"remainder": "taylor", "first_order": "mixed"},
        },
        "ours",
    ),
    Case("aurora, INT8", "aurora", {"precision": "int8"}, "ours"),
)
SWEPT = (
    "PISA",
    "XAttention",
    "DraftAttention",
    "aurora",
    DROP,
    "boxes 2x2x16, mixed first order, predicted error",
)


@dataclass(frozen=True)
class Figure:
    """One method on one call.

    Args:
        label, kind: of the case.
        call: prompt, layer and step.
        shape: heads x tokens x head size.
        requested: the density asked for.
        density: what was computed.
        error: |out - dense| / |dense| over all heads.
        milliseconds: CPU time of selection and attention, and of an order that differs from call to call; where it is
            kept for some steps, their share of the time for making it.
        moving: CPU time of moving q, k, v and the output in and out of an order that depends on the layout alone: a
            pipeline does it once per forward pass.
    """

    label: str
    kind: str
    call: str
    shape: str
    requested: float
    density: float
    error: float
    milliseconds: float
    moving: float


def whole_blocks(density: float, tokens: int) -> float:
    """The density rounded down to whole blocks of 64: what every rule of rounding, per row or per layer, grants."""
    blocks = -(-tokens // _BLOCK)
    return max(1, math.floor(density * blocks + 1e-6)) / blocks


def measure(
    runs: Sequence[tuple[Case, float]],
    calls: Sequence[Call],
    references: Sequence[Tensor],
    prompt: str = "",
    earlier: Sequence[Call] = (),
) -> list[Figure]:
    """Run methods at densities on calls in the order of the steps, with memory per layer.

    All run on a call before the next one, so that figures of the same call were taken within seconds. A method that
    keeps its order for some steps is judged at the last of them: it makes the order at the call of as many steps
    before, among `earlier` (where there is none, at the call itself), and the time for that is shared by the steps,
    and by the two branches of guidance where they use the same.
    """
    figures, memories = [], [dict[int, dict[str, Any]]() for _ in runs]
    found = {(call.layer, call.step): call for call in earlier}
    for call, reference in zip(calls, references, strict=True):
        for (case, density), memory in zip(runs, memories, strict=True):
            asked = whole_blocks(density, call.layout.tokens)
            method = get_method(case.method, density=asked, **case.parameters)
            kept, steps = memory.setdefault(call.layer, {}), steps_of_order(method)
            has_share = calls_of_order(method) > 1
            first = found.get((call.layer, call.step - steps + 1), call)
            ordering = clocked(partial(method.order, *first.qkv, _context(first, kept)))[0] if has_share else 0.0
            out, computed, spent, moving = _attend(method, call, _context(call, kept))
            error, spent = float((out - reference).norm() / reference.norm()), spent + ordering / calls_of_order(method)
            name = f"{prompt}, {call.name}" if prompt else call.name
            shape = "x".join(map(str, reference.shape[1:]))
            figures.append(Figure(case.label, case.kind, name, shape, density, computed, error, spent, moving))
    return figures


def steps_of_order(method: Method) -> int:
    """For how many steps an order by content is used."""
    return method.renew if isinstance(method, Composed) and method.order_ == "kmeans" else 1


def calls_of_order(method: Method) -> int:
    """For how many calls of a layer an order by content is used, in a run with guidance."""
    return steps_of_order(method) * (2 if isinstance(method, Composed) and method.across_branches else 1)


def _context(call: Call, memory: dict[str, Any]) -> CallContext:
    return CallContext(call.layout, call.layer, call.step, memory=memory, branches=memory)


def _attend(method: Method, call: Call, context: CallContext) -> tuple[Tensor, float, float, float]:
    """Output in the raster, density, milliseconds, and those of moving where the order is static."""
    ordering, order = clocked(lambda: method.order(*call.qkv, context))
    entering, qkv = clocked(lambda: call.qkv if order is None else order.apply(*call.qkv))
    context.values = qkv[2]
    selecting, plan = clocked(lambda: method.select(*qkv[:2], context))
    attending, out = clocked(lambda: method.compute(*qkv, plan, context))
    leaving, out = clocked(partial(_restored, order, out))
    moving = ordering + entering + leaving
    spent, moving = (0.0, moving) if method.has_static_order else (moving, 0.0)
    return out, plan.density + context.extra_density, spent + selecting + attending, moving


def _restored(order: TokenOrder | None, out: Tensor) -> Tensor:
    return out if order is None else order.restore(out)
