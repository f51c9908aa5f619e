"""What a candidate costs in time, beside dense attention on the same queries, keys and values.

Each layer is timed whole and with half of its heads: what both halves take more than the whole is what a further group
of heads costs. Order is timed apart, because one that all layers share is applied once per pass and costs them nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from dit_accel.bench.timing import seconds, timed
from dit_accel.bench.verify import request_for
from dit_accel.engine import DenseCall
from dit_accel.kernels.dense import dense_attention
from dit_accel.kernels.registry import choose_backend
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder
from dit_accel.parts import of_heads
from dit_accel.planner import QKV
from dit_accel.state import CallContext

TIMES = ("whole", "order of the whole", "half", "order of the half")
_ROUNDS = 2


def layer_times(methods: Sequence[Method], seen: DenseCall) -> Tensor:
    """Times of a call under each method, as shares of that of dense attention, fp64 `[4, methods]`; see `TIMES`.

    Each is the best of a few after one run that does not count. A static plan is made once and not counted. Where a
    method computes more than the break-even of its backend, the call would run dense, and takes that time.
    """
    qkv = (seen.q, seen.k, seen.v)
    heads = torch.arange(seen.q.shape[1] // 2, device=seen.q.device)
    dense = _dense(qkv)
    dense_half = _dense(of_heads(qkv, heads)) if len(heads) else dense / 2
    found = torch.empty(len(TIMES), len(methods), dtype=torch.float64)
    for index, method in enumerate(methods):
        whole = _best(method, seen, None, dense)
        half = _best(method, seen, heads, dense_half) if len(heads) else (whole[0] / 2, whole[1] / 2)
        found[:, index] = torch.tensor([*whole, *half], dtype=torch.float64) / dense
    return found


def _dense(qkv: QKV) -> float:
    run = partial(dense_attention, *qkv)
    run()
    return min(seconds(run, qkv[0].device) for _ in range(_ROUNDS))


def _best(method: Method, seen: DenseCall, heads: Tensor | None, dense: float) -> tuple[float, float]:
    """Seconds in place, and seconds of ordering, of the fastest run."""
    state = seen.state
    call = CallContext(seen.layout, seen.layer, state.step, state.noise, state.branch)
    out, runs = torch.empty_like(seen.q), []
    for number in range(_ROUNDS + 1):
        runs.append(_once(method, seen, heads, replace(call, step=state.step + number), out, dense))
    return min(runs[1:], key=sum)


def _once(
    method: Method, seen: DenseCall, heads: Tensor | None, call: CallContext, out: Tensor, dense: float
) -> tuple[float, float]:
    """One run as the engine would make it: the heads are taken, ordered, attended, restored and put where they were."""
    device = seen.q.device
    taking, qkv = timed(partial(of_heads, (seen.q, seen.k, seen.v), heads), device)
    making, order = timed(lambda: _order(method, qkv, call), device)
    moving, ordered = timed(lambda: qkv if order is None else order.apply(*qkv), device)
    call.values = ordered[2]
    selecting, plan = timed(lambda: method.select(*ordered[:2], call).to(device), device)
    backend = choose_backend("auto", request_for(method, ordered[0], plan))
    if plan.density + call.extra_density > backend.break_even:
        putting = 0.0 if heads is None else seconds(lambda: out.index_copy_(1, heads, qkv[0]), device)
        return taking + dense + putting, 0.0
    attending, result = timed(lambda: method.compute(*ordered, plan, call, backend=backend.name), device)
    restoring, result = timed(lambda: result if order is None else order.restore(result), device)
    putting = 0.0 if heads is None else seconds(lambda: out.index_copy_(1, heads, result), device)
    planning = (0.0, 0.0) if method.is_static else (selecting, making)
    return taking + planning[0] + attending + putting, planning[1] + moving + restoring


def _order(method: Method, qkv: QKV, call: CallContext) -> TokenOrder | None:
    order = method.order(*qkv, call)
    return None if order is None else order.to(qkv[0].device)
