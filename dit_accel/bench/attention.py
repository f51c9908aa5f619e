"""One attention call by each method against dense: verified on a small case, then timed at the real shape."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.bench.random_blocks import RandomBlocks
from dit_accel.bench.shapes import Shape, structured_qkv
from dit_accel.bench.timing import DenseRun, Spread, available_bytes, fastest_dense, interleaved, ratios, seconds, timed
from dit_accel.errors import DitAccelError
from dit_accel.kernels import block_attention
from dit_accel.kernels.attention import request_of
from dit_accel.kernels.registry import Request, choose_backend
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method, method_class
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext

_SMALL_GRID = (3, 13, 11)  # no multiple of any block or tile
_TOLERANCE = {torch.float32: 2e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_PROBE_TOKENS = 2048


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        device, dtype: where, and in what.
        rounds: interleaved rounds.
        heads: heads to time. Default None: those of the model, or as many as `limit` allows.
        limit: longest dense call in seconds; heads are left out to keep to it. Default 60.
        backend: backend of `block_attention`. Default "auto".
        seed: of the inputs.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    heads: int | None = None
    limit: float = 60.0
    backend: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the table; times in ms, empty where nothing was timed and `note` says why."""

    shape: str
    grid: str
    text: int
    tokens: int
    heads: int
    model_heads: int
    head_dim: int
    dtype: str
    method: str
    parameters: str
    backend: str = ""
    requested_density: float | None = None
    density: float | None = None
    dense_backend: str = ""
    dense_ms: float | None = None
    order_ms: float | None = None
    select_ms: float | None = None
    select_first_ms: float | None = None
    attend_ms: float | None = None
    overhead: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    verified_error: float | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, rounded to what a timer can tell."""
        return {
            name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in asdict(self).items()
        }


def variants(names: Iterable[str], densities: Sequence[float]) -> list[Method]:
    """Every method at every density; a method without a density once, with its defaults.

    Args:
        names: registered methods, or "random_blocks" for the kernel alone.
        densities: none: the defaults of the methods.
    """
    found: list[Method] = []
    for name in names:
        if name == RandomBlocks.name:
            found += [RandomBlocks(density=d) for d in densities] or [RandomBlocks()]
        elif "density" in method_class(name).model_fields and densities:
            found += [get_method(name, density=d) for d in densities]
        else:
            found.append(get_method(name))
    return found


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
        backend = choose_backend(name, _request(method, q, plan)).name
        outs.append(method.compute(q.to(dtype), k.to(dtype), v.to(dtype), plan, call, backend=backend).double())
    error = float((outs[0] - outs[1]).abs().max() / outs[1].abs().max())
    whole = block_attention(q, k, v, BlockPlan.full(plan.q_blocks, plan.k_blocks, q.device), backend=options.backend)
    dense = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    error = max(error, float((whole.double() - dense).abs().max() / dense.abs().max()))
    if not error <= _TOLERANCE.get(options.dtype, 1e-6):
        raise DitAccelError(f"wrong: the small case is off by {error:.2g}")
    return error


@dataclass
class _Case:
    """One method on the tensors to time, with the state it keeps between calls."""

    method: Method
    qkv: tuple[Tensor, Tensor, Tensor]
    call: CallContext
    backend: str
    times: dict[str, list[float]] = field(default_factory=lambda: {"order": [], "select": [], "attend": []})
    density: float = 1.0
    chosen: str = ""

    def run(self) -> float:
        """One timed call, as the engine would make it, but for a static plan, which is made once and does not count."""
        device, (q, k, v) = self.qkv[0].device, self.qkv

        def put_in_order() -> tuple[TokenOrder | None, tuple[Tensor, Tensor, Tensor]]:
            order = self.method.order(q, k, v, self.call)
            order = None if order is None else order.to(device)
            return order, (q, k, v) if order is None else order.apply(q, k, v)

        ordering, (order, ordered) = timed(put_in_order, device)
        self.call.values = ordered[2]
        selecting, plan = timed(lambda: self.method.select(*ordered[:2], self.call).to(device), device)
        self.chosen = choose_backend(self.backend, _request(self.method, ordered[0], plan)).name

        def attend() -> Tensor:
            out = self.method.compute(*ordered, plan, self.call, backend=self.chosen)
            return out if order is None else order.restore(out)

        attending = seconds(attend, device)
        for name, spent in (("order", ordering), ("select", selecting), ("attend", attending)):
            self.times[name].append(spent)
        self.density = plan.density + self.call.extra_density
        self.call = replace(self.call, step=self.call.step + 1, values=None, extra_density=0.0, measures={})
        return ordering + attending + (0.0 if self.method.is_static else selecting)


def _request(method: Method, q: Tensor, plan: BlockPlan) -> Request:
    """What `method` asks of a backend. q `[B, H, N, D]`."""
    return request_of(q, plan, method.remainder, method.completes, method.precision)


def measure(shape: Shape, methods: Sequence[Method], options: Options) -> Iterator[Row]:
    """Verify and time every method at one shape, one row each; a method that fails or is wrong gets a note instead."""
    heads, told = heads_that_fit(shape, options)
    if heads == 0:
        yield from (replace(_row(shape, m, options, 0), note=told) for m in methods)
        return
    good: list[tuple[Method, float]] = []
    for method in methods:
        try:
            good.append((method, verify(method, shape, options)))
        except (DitAccelError, RuntimeError) as error:
            yield replace(_row(shape, method, options, heads), note=str(error).splitlines()[0])
    if not good:
        return
    q, k, v = structured_qkv(shape.layout, heads, shape.head_dim, options.device, options.dtype, options.seed)
    dense_name, dense = fastest_dense(q, k, v)
    for method, off in good:
        row = replace(_row(shape, method, options, heads), dense_backend=dense_name, verified_error=off, note=told)
        try:
            yield _timed(row, method, (q, k, v), dense, shape.layout, options)
        except (DitAccelError, RuntimeError) as failure:
            yield replace(row, note=str(failure).splitlines()[0])


def _timed(
    row: Row,
    method: Method,
    qkv: tuple[Tensor, Tensor, Tensor],
    dense: DenseRun,
    layout: TokenLayout,
    options: Options,
) -> Row:
    """Dense and the method in interleaved rounds, after one call of each that does not count."""
    case = _Case(method, qkv, CallContext(layout, seed=options.seed), options.backend)
    case.run()
    first = case.times["select"][0]
    case.times = {name: [] for name in case.times}
    base, total = interleaved([partial(seconds, partial(dense, *qkv), options.device), case.run], options.rounds)
    ratio = ratios(base, total)
    parts = {name: Spread.of(times).median for name, times in case.times.items()}
    select = 0.0 if method.is_static else parts["select"]
    return replace(
        row,
        backend=case.chosen,
        density=case.density,
        dense_ms=1e3 * Spread.of(base).median,
        order_ms=1e3 * parts["order"],
        select_ms=1e3 * select,
        select_first_ms=1e3 * first,
        attend_ms=1e3 * parts["attend"],
        overhead=(parts["order"] + select) / Spread.of(base).median,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
    )


def _row(shape: Shape, method: Method, options: Options, heads: int) -> Row:
    layout = shape.layout
    return Row(
        shape=shape.name,
        grid="x".join(map(str, layout.grid)),
        text=layout.text,
        tokens=layout.tokens,
        heads=heads,
        model_heads=shape.heads,
        head_dim=shape.head_dim,
        dtype=str(options.dtype)[6:],
        method=method.name,
        parameters=json.dumps(method.model_dump(mode="json", exclude_unset=True)),
        requested_density=method.requested_density,
    )


def heads_that_fit(shape: Shape, options: Options) -> tuple[int, str]:
    """How many heads to time, and why not all; 0 when not even one fits into time and memory."""
    wanted = options.heads or shape.heads
    one = 4 * shape.layout.tokens * shape.head_dim * options.dtype.itemsize  # q, k, v and the output
    free = available_bytes(options.device)
    fits = wanted if free is None else int(0.5 * free // (2 * one))  # orders and padding copy once
    small = TokenLayout((1, 1, min(_PROBE_TOKENS, shape.layout.tokens)))
    q, k, v = structured_qkv(small, 2, shape.head_dim, options.device, options.dtype)
    _, dense = fastest_dense(q, k, v)
    taken = seconds(partial(dense, q, k, v), options.device) / 2 * (shape.layout.tokens / small.tokens) ** 2
    in_time = int(options.limit // taken)
    heads = min(wanted, fits, in_time)
    if heads < 1:
        what = f"one head takes about {taken:.0f} s" if in_time < 1 else "one head does not fit into memory"
        return 0, f"not timed: {what}"
    return heads, "" if heads == shape.heads else f"{heads} of {shape.heads} heads"


def stamp() -> dict[str, str]:
    """Date, hardware and versions: the columns that make a row of figures worth keeping."""
    from dit_accel.report import environment

    return {"date": time.strftime("%Y-%m-%d"), **environment()}
