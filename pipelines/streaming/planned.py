"""Any method of the library inside the window of a stream: the same orders, plans, remainders and precisions.

Axis legend: B batch, N queries, M keys, H heads, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder
from dit_accel.pipelines.streaming.attention import CLEAN, AttentionCall, DenseContext
from dit_accel.pipelines.streaming.records import run_plan
from dit_accel.plan import BlockPlan
from dit_accel.report.records import CallRecord
from dit_accel.rows import rows_of_plan
from dit_accel.state import CallContext


class PlannedContext(DenseContext):
    """Runs `method` over the visible frames as if they were one video, for the rows of the chunk alone.

    The sink is the prefix of that video, so methods keep it. Where a method looks at queries, those of the chunk stand
    for the queries of past frames, which do not exist any more.

    Args:
        method: see `dit_accel.get_method`; `refusal` says which cannot serve.
        dense_clean: run the cache-writing pass dense, since everything later reads what it writes. Default True.
        min_frames: windows with fewer frames run dense. Default 6.
    """

    def __init__(self, method: Method, dense_clean: bool = True, min_frames: int = 6) -> None:
        self.method, self.dense_clean, self.min_frames = method, dense_clean, min_frames
        self.name, self.requested_density = method.name, method.requested_density
        self._memory: dict[Any, dict[str, Any]] = {}
        self._static: tuple[tuple[Any, ...], tuple[TokenOrder | None, BlockPlan]] | None = None

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]`."""
        if len(call.frames) < self.min_frames:
            reason = f"{len(call.frames)} frames are fewer than min_frames {self.min_frames}"
            return self.dense(call, q, k, v, reason)
        if call.step == CLEAN and self.dense_clean:
            return self.dense(call, q, k, v, "the pass that writes the cache is dense")
        frames = sorted(call.frames)
        place = [call.frames.index(frame) for frame in frames]
        k, v = (x.unflatten(1, (len(frames), -1))[:, place].flatten(1, 2).transpose(1, 2) for x in (k, v))
        layout = TokenLayout((len(frames), *call.grid), prefix_frames=_prefix(frames))
        repeats = -(-k.shape[2] // q.shape[1])
        queries = q.repeat(1, repeats, 1, 1)[:, -k.shape[2] :].transpose(1, 2)
        with call.record.timed("select", q.device):
            order, plan = self._plan(layout, queries, k, v, call)
        first = frames.index(call.own.start) * call.frame_tokens
        own = torch.arange(first, first + q.shape[1])
        scale = self.method.logit_scale(q.shape[-1], layout)
        return _rows_of(queries, k, v, order, plan, own, self.method, scale, call.record).transpose(1, 2)

    def _plan(
        self, layout: TokenLayout, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall
    ) -> tuple[TokenOrder | None, BlockPlan]:
        """Order and plan of the whole visible video; a static one is kept while the layout stays."""
        key = (layout, q.device)
        if self.method.is_static and self._static is not None and self._static[0] == key:
            return self._static[1]
        memory, shared = (self._memory.setdefault(name, {}) for name in (call.layer, "shared"))
        context = CallContext(layout, call.layer, max(0, call.step), memory=memory, shared=shared)
        planned = self.method.plan(layout, q, k, v, context)
        if self.method.is_static:
            self._static = (key, planned)
        return planned

    def begin_chunk(self, frames: range) -> None:
        """What a method kept holds for the steps of one chunk."""
        self._memory.clear()

    def reset(self) -> None:
        """The prompt or the scene has changed."""
        self._memory.clear()


def refusal(method: Method) -> str | None:
    """Why a method cannot run inside the window of a stream; None: it can."""
    if method.orders_each_head:
        return "its order differs between heads, and the rows of a chunk are found in an order of all heads"
    if method.completes:
        return "it computes more than its blocks, with the queries of the whole video"
    return None


def _prefix(frames: list[int]) -> int:
    """Leading frames that the window has left behind: the sink, once there is a gap after it; else none."""
    gaps = [index for index in range(1, len(frames)) if frames[index] != frames[index - 1] + 1]
    return gaps[0] if gaps else 0


def _rows_of(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    order: TokenOrder | None,
    plan: BlockPlan,
    own: Tensor,
    method: Method,
    scale: float | None,
    record: CallRecord,
) -> Tensor:
    """Attention of the tokens `own` alone.

    Args:
        q, k, v: `[B, H, M, D]` in raster order.
        order, plan: of the whole sequence.
        own: token indices, int64 `[N]` on the CPU.
        method: says remainder and precision.
        scale: factor on the logits. None: 1 / sqrt(D).
        record: of the call.
    """
    at = own
    if order is not None:
        if order.query.ndim > 1:
            raise UnsupportedError(f"streaming with {method.name!r}: its order differs between heads; choose another")
        at = order.inverse.cpu()[own]
        with record.timed("order", q.device):
            q, k, v = order.to(q.device).apply(q, k, v)
    tokens, place = at.sort()
    on_device, some = tokens.to(q.device), rows_of_plan(plan, tokens)
    out = run_plan(
        record, q[:, :, on_device], k, v, some, scale=scale, remainder=method.remainder, precision=method.precision
    )
    return out[:, :, place.argsort().to(q.device)]
