"""One attention call by each method against dense: verified on a small case, then timed at the real shape."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

from torch import Tensor

from dit_accel.bench.options import TIME_IS_UP, Options, heads_that_fit
from dit_accel.bench.random_blocks import RandomBlocks
from dit_accel.bench.shapes import Shape, structured_qkv
from dit_accel.bench.timing import DenseRun, Spread, fastest_dense, interleaved, ratios, seconds, timed
from dit_accel.bench.verify import request_for, verify
from dit_accel.errors import DitAccelError
from dit_accel.kernels.registry import choose_backend
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.order import TokenOrder
from dit_accel.state import CallContext


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
    """Every method at every density; a method without a density once.

    Args:
        names: registered methods, with their defaults; presets, whose method it is then with the preset's parameters;
            or "random_blocks" for the kernel alone.
        densities: none: those of the methods or presets.

    Raises:
        ConfigError: a name that is none of them.
    """
    found: list[Method] = []
    for name in names:
        if name == RandomBlocks.name:
            found += [RandomBlocks(density=d) for d in densities] or [RandomBlocks()]
            continue
        method, parameters = _method_of(name)
        if "density" in method_class(method).model_fields and densities:
            found += [get_method(method, **{**parameters, "density": d}) for d in densities]
        else:
            found.append(get_method(method, **parameters))
    return found


def _method_of(name: str) -> tuple[str, dict[str, Any]]:
    """A method's name and parameters, where `name` is a method or a preset."""
    if name not in list_methods():
        # Kernels are measured on machines that have torch alone, too.
        from dit_accel.presets import list_presets, load_preset

        if name in list_presets():
            spec = load_preset(name).method
            return spec.name, spec.parameters
    return name, {}


@dataclass
class Case:
    """One method on the tensors to time, with the state it keeps between calls."""

    method: Method
    qkv: tuple[Tensor, Tensor, Tensor]
    call: CallContext
    backend: str
    times: dict[str, list[float]] = field(default_factory=lambda: {"order": [], "select": [], "attend": []})
    densities: list[float] = field(default_factory=list)
    chosen: str = ""
    break_even: float = 1.0

    def round(self) -> float:
        """Seconds of one call, in the mean over the steps after which the method's costs repeat; parts go to `times`.

        A static plan is made once in a run and does not count.
        """
        calls = [self.run() for _ in range(self.method.cycle)]
        parts = {name: fmean(call[name] for call in calls) for name in self.times}
        for name, spent in parts.items():
            self.times[name].append(spent)
        return parts["order"] + parts["attend"] + (0.0 if self.method.is_static else parts["select"])

    def run(self) -> dict[str, float]:
        """One call, as the engine would make it; seconds of its parts."""
        device, (q, k, v) = self.qkv[0].device, self.qkv

        def put_in_order() -> tuple[TokenOrder | None, tuple[Tensor, Tensor, Tensor]]:
            order = self.method.order(q, k, v, self.call)
            order = None if order is None else order.to(device)
            return order, (q, k, v) if order is None else order.apply(q, k, v)

        ordering, (order, ordered) = timed(put_in_order, device)
        self.call.values = ordered[2]
        selecting, plan = timed(lambda: self.method.select(*ordered[:2], self.call).to(device), device)
        backend = choose_backend(self.backend, request_for(self.method, ordered[0], plan))
        self.chosen, self.break_even = backend.name, backend.break_even

        def attend() -> Tensor:
            out = self.method.compute(*ordered, plan, self.call, backend=self.chosen)
            return out if order is None else order.restore(out)

        attending = seconds(attend, device)
        self.densities.append(plan.density + self.call.extra_density)
        self.call = replace(self.call, step=self.call.step + 1, values=None, extra_density=0.0, measures={})
        return {"order": ordering, "select": selecting, "attend": attending}


def measure(shape: Shape, methods: Sequence[Method], options: Options) -> Iterator[Row]:
    """Verify and time every method at one shape, one row each; a method that fails or is wrong gets a note instead."""
    heads, told = (0, TIME_IS_UP) if options.is_over else heads_that_fit(shape, options)
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
        if options.is_over:
            yield replace(row, note=TIME_IS_UP)
            continue
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
    """Dense and the method in interleaved rounds, after a call of the method that does not count."""
    case = Case(method, qkv, CallContext(layout, seed=options.seed), options.backend)
    first = case.run()["select"]
    case.densities.clear()
    base, total = interleaved([partial(seconds, partial(dense, *qkv), options.device), case.round], options.rounds)
    ratio = ratios(base, total)
    parts = {name: Spread.of(times).median for name, times in case.times.items()}
    select = 0.0 if method.is_static else parts["select"]
    return replace(
        row,
        backend=case.chosen,
        density=fmean(case.densities),
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
