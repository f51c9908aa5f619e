"""What a candidate costs in time, beside dense attention on the same queries, keys and values."""

from __future__ import annotations

from functools import partial

from dit_accel.bench.attention import Case
from dit_accel.bench.timing import seconds
from dit_accel.engine import DenseCall
from dit_accel.kernels.dense import dense_attention
from dit_accel.methods.base import Method
from dit_accel.state import CallContext

_ROUNDS = 2


def dense_seconds(seen: DenseCall) -> float:
    """Dense attention on a call's q, k, v `[B, H, N, D]`: the best of two runs after one that does not count."""
    run = partial(dense_attention, seen.q, seen.k, seen.v)
    run()
    return min(seconds(run, seen.q.device) for _ in range(_ROUNDS))


def method_seconds(method: Method, seen: DenseCall, dense: float) -> float:
    """A method on the same call as the engine would run it: order, selection and attention; timed likewise.

    A static plan is made once and not counted. Where the method computes more than the break-even of its backend, the
    call would run dense, and takes the time `dense`.
    """
    state = seen.state
    call = CallContext(seen.layout, seen.layer, state.step, state.noise, state.branch)
    case = Case(method, (seen.q, seen.k, seen.v), call, "auto")
    case.run()
    if case.density > case.break_even:
        return dense
    return min(case.run() for _ in range(_ROUNDS))
