"""Timing of `block_attention` alone: every configuration is checked numerically first, then timed against dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal

import torch
from torch import Tensor

from dit_accel.bench.options import TIME_IS_UP, Options, heads_that_fit
from dit_accel.bench.shapes import Shape
from dit_accel.bench.timing import DenseRun, Spread, fastest_dense, interleaved, ratios, seconds
from dit_accel.bench.verify import verify_kernel
from dit_accel.errors import ConfigError, DitAccelError, near_matches
from dit_accel.kernels import Precision, Remainder, block_attention
from dit_accel.kernels.attention import request_of
from dit_accel.kernels.registry import choose_backend
from dit_accel.kernels.selftest import fault_of
from dit_accel.plan import Blocking, BlockPlan

Pattern = Literal["random", "window"]
DENSITIES = (0.05, 0.1, 0.125, 0.2, 0.3, 0.5, 1.0)
VARIANTS: dict[str, tuple[Remainder | None, Precision | None]] = {
    "exact": (None, None),
    "order0": (Remainder(), None),
    "diagonal": (Remainder("diagonal"), None),
    "global": (Remainder(first_order="global"), None),
    "grouped": (Remainder(first_order="grouped"), None),
    "about": (Remainder(about="query"), None),
    "mixed": (Remainder(first_order="mixed", about="query"), None),
    "int8": (None, Precision("int8")),
    "int8_fp8": (None, Precision("int8", pv="fp8")),
}
"""What is computed, by name: exact blocks alone, with a remainder, or with operands of 8 bits."""


@dataclass(frozen=True)
class KernelRow:
    """One line of the table; times in ms, empty where nothing was timed and `note` says why.

    Args:
        rate: TFLOP/s over the selected pairs, 4 D operations each.
        efficiency: that rate as a share of the dense one; the density at which both take the same time.
        extra: time beyond that of "exact" at the same density, as a share of it; empty without that row.
        verified_error: largest error on a small case of ragged blocks, against the float64 specification.
    """

    shape: str
    tokens: int
    heads: int
    model_heads: int
    head_dim: int
    dtype: str
    q_block: int
    k_block: int
    pattern: Pattern
    variant: str
    requested_density: float
    density: float | None = None
    backend: str = ""
    dense_backend: str = ""
    dense_ms: float | None = None
    attend_ms: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    dense_rate: float | None = None
    rate: float | None = None
    efficiency: float | None = None
    extra: float | None = None
    verified_error: float | None = None
    note: str = ""


MARKDOWN = {
    "shape": "",
    "tokens": "d",
    "heads": "d",
    "variant": "",
    "requested_density": ".1%",
    "backend": "",
    "attend_ms": ".2f",
    "dense_backend": "",
    "dense_ms": ".2f",
    "ratio": ".2f",
    "rate": ".3g",
    "dense_rate": ".3g",
    "efficiency": ".2f",
    "extra": "+.0%",
    "note": "",
}
"""Columns of the table for people, and how their values are written."""


def find_variants(names: Sequence[str]) -> list[str]:
    """The names as given, all of them when none is.

    Raises:
        ConfigError: a name is unknown.
    """
    for name in names:
        if name not in VARIANTS:
            raise ConfigError("--variants", f"unknown variant {name!r}{near_matches(name, VARIANTS)}")
    return list(names) or list(VARIANTS)


def find_pattern(name: str) -> Pattern:
    """The pattern called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name == "random":
        return "random"
    if name == "window":
        return "window"
    raise ConfigError("--pattern", f"expected 'random' or 'window', got {name!r}")


def pattern_plan(
    pattern: Pattern, tokens: int, blocks: tuple[int, int], heads: int, density: float, device: torch.device, seed: int
) -> BlockPlan:
    """A plan in which every row selects the same number of blocks.

    Args:
        pattern: "random": other blocks for each row and head; "window": the nearest blocks, the same for all heads.
        tokens: length of queries and keys.
        blocks: query and key block size.
        heads: heads of a random plan.
        density: share of the key blocks, at least one.
        device: where the plan is made.
        seed: of the random draw.
    """
    q_blocks, k_blocks = (Blocking.uniform(tokens, size) for size in blocks)
    rows, columns = q_blocks.count, k_blocks.count
    keep = min(columns, max(1, round(density * columns)))
    if pattern == "window":
        centre = (torch.arange(rows, device=device) + 0.5) * (columns / rows)
        first = (centre - keep / 2).round().clamp(0, columns - keep).long()
        lists = (first.unsqueeze(-1) + torch.arange(keep, device=device)).view(1, 1, rows, keep)
    else:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = torch.rand(1, heads, rows, columns, generator=generator, device=device)
        lists = drawn.topk(keep, dim=-1).indices.sort(-1).values
    counts = torch.full(lists.shape[:3], keep, dtype=torch.int32, device=device)
    return BlockPlan(q_blocks, k_blocks, lists.to(torch.int32), counts)


class KernelBench:
    """One shape on one device: inputs, plans and the dense baseline are made once, when the first row asks for them.

    Args:
        shape: the call.
        options: where and how often.
        blocks: query and key block size. Default (128, 64).
        pattern: see `pattern_plan`. Default "random".
    """

    def __init__(
        self, shape: Shape, options: Options, blocks: tuple[int, int] = (128, 64), pattern: Pattern = "random"
    ) -> None:
        heads, note = heads_that_fit(shape, options)
        sizes = (shape.layout.tokens, heads, shape.heads, shape.head_dim)
        self.heads, self.options = heads, options
        self.empty = KernelRow(shape.name, *sizes, str(options.dtype)[6:], *blocks, pattern, "", 0.0, note=note)
        self.exact_ms: dict[float, float | None] = {}
        self._plan: tuple[float, BlockPlan] | None = None
        self._shape = shape

    @cached_property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v `[1, heads, N, D]`."""
        return _drawn(self._shape, self.heads, self.options)

    @cached_property
    def dense(self) -> tuple[str, DenseRun]:
        """The fastest dense attention found for them, and its name."""
        return fastest_dense(*self.inputs)

    def plan(self, density: float) -> BlockPlan:
        """The plan of this density; the last one is kept."""
        if self._plan is None or self._plan[0] != density:
            row, device = self.empty, self.options.device
            sizes = (row.q_block, row.k_block)
            made = pattern_plan(row.pattern, row.tokens, sizes, row.heads, density, device, self.options.seed)
            self._plan = (density, made)
        return self._plan[1]

    def attend(self, density: float) -> Tensor:
        """Exact attention at this density, `[1, heads, N, D]`."""
        return block_attention(*self.inputs, self.plan(density), backend=self.options.backend)

    def row(self, density: float, variant: str) -> KernelRow:
        """Time one variant of `VARIANTS` at one density; a failure is told in `note`."""
        row = replace(self.empty, variant=variant, requested_density=density)
        if self.options.is_over:
            return replace(row, note=TIME_IS_UP)
        try:
            row = replace(row, dense_backend=self.dense[0])
            exact_ms = self.exact_ms.get(density)
            row = _timed(row, self.inputs, self.plan(density), self.dense[1], self.options, exact_ms)
        except Exception as failure:  # Out of memory, a compiler's crash, a driver's error: the rest still runs.
            row = replace(row, note=f"failed: {type(failure).__name__}: {failure}".splitlines()[0])
        if variant == "exact":
            self.exact_ms[density] = row.attend_ms
        return row


def measure_kernels(
    shape: Shape,
    densities: Sequence[float],
    variants: Sequence[str],
    options: Options,
    blocks: tuple[int, int] = (128, 64),
    pattern: Pattern = "random",
) -> Iterator[KernelRow]:
    """One row for each density and variant on one shape, in this order; one that fails says so and loses no other.

    Args:
        shape: the call.
        densities: shares of the key blocks.
        variants: names from `VARIANTS`.
        options: where and how often.
        blocks: query and key block size. Default (128, 64).
        pattern: see `pattern_plan`. Default "random".
    """
    bench = KernelBench(shape, options, blocks, pattern)
    if not bench.heads:
        yield bench.empty
        return
    for density in densities:
        for variant in variants:
            yield bench.row(density, variant)


def _drawn(shape: Shape, heads: int, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[1, heads, N, D]`, drawn on the device, where long ones are drawn in no time."""
    generator = torch.Generator(options.device).manual_seed(options.seed)
    size = (1, heads, shape.layout.tokens, shape.head_dim)
    q, k, v = (torch.randn(size, generator=generator, device=options.device, dtype=options.dtype) for _ in range(3))
    return q, k, v


def _verified(row: KernelRow, options: Options) -> float:
    """The error on a small case of the same kind: two heads, a few blocks, the last ones short."""
    sizes, device = (row.q_block, row.k_block), options.device
    tokens = 2 * max(sizes) + max(sizes) // 3 + 1
    generator = torch.Generator().manual_seed(options.seed)
    draws = (torch.randn(1, 2, tokens, row.head_dim, generator=generator).to(device, options.dtype) for _ in range(3))
    plan = pattern_plan("random", tokens, sizes, 2, 0.4, device, options.seed)
    return verify_kernel((next(draws), next(draws), next(draws)), plan, *VARIANTS[row.variant], options)


def _timed(
    row: KernelRow,
    qkv: tuple[Tensor, Tensor, Tensor],
    plan: BlockPlan,
    dense: DenseRun,
    options: Options,
    exact_ms: float | None,
) -> KernelRow:
    """Dense and the variant in interleaved rounds, after a check of the numbers and a call that does not count."""
    remainder, precision = VARIANTS[row.variant]
    request = request_of(qkv[0], plan, remainder, precision=precision)
    chosen = choose_backend(options.backend, request)
    row = replace(row, backend=chosen.name)
    fault = fault_of(chosen, request)
    if fault is not None:
        return replace(row, note=f"not timed: {fault}")
    try:
        row = replace(row, verified_error=_verified(row, options))
    except DitAccelError as wrong:
        return replace(row, note=f"not timed: {wrong}")
    attend = partial(block_attention, *qkv, plan, remainder=remainder, precision=precision, backend=chosen.name)
    runs: list[Callable[[], Tensor]] = [partial(dense, *qkv), attend]
    for run in runs:
        run()
    clocks = [partial(device_seconds, run, options.device) for run in runs]
    base, taken = interleaved(clocks, options.rounds)
    ratio, density = ratios(base, taken), plan.density
    dense_ms, attend_ms = (1e3 * Spread.of(times).median for times in (base, taken))
    operations = 4e-9 * row.heads * row.head_dim * row.tokens**2  # in TFLOP per ms of dense attention
    return replace(
        row,
        density=density,
        dense_ms=dense_ms,
        attend_ms=attend_ms,
        ratio=ratio.median,
        ratio_low=ratio.low,
        ratio_high=ratio.high,
        dense_rate=operations / dense_ms,
        rate=density * operations / attend_ms,
        efficiency=ratio.median * density,
        extra=None if exact_ms is None or row.variant == "exact" else attend_ms / exact_ms - 1,
    )


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: between two events on a CUDA stream, elsewhere by the clock on the wall."""
    if device.type != "cuda":
        return seconds(run, device)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3
