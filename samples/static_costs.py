"""What plans and orders of static methods cost on one core: `python samples/static_costs.py`.

Plans are made for 118,800 tokens with nothing kept from before. Orders are timed against dense attention of the same
tokens: where every layer puts q, k, v into tiles and its output back, and where that is hoisted out of the blocks, so
that hidden states and rotary tables are permuted once for all layers. Writes `docs/results/static_costs.md`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dit_accel.families.hoisting import permute_tokens
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.methods.svg import SVG, plans_of_kinds
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.plan import BlockPlan
from dit_accel.report.records import environment
from dit_accel.state import CallContext

LONG = TokenLayout((33, 45, 80))
GRIDS = ((16, 16, 16), (16, 16, 32), (16, 32, 32))
_TILE = (4, 4, 4)
# With a density, radial and clear search: that is their slowest case.
_VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {"radial": ({}, {"density": 0.3}), "grat": ({}, {"density": 0.3})}
_RIMS: tuple[tuple[str, dict[str, Any], tuple[int, int, int]], ...] = (
    ("clear", {"radius": 16.0}, (1, 64, 64)),
    ("svg", {"density": 0.25}, (8, 24, 32)),
)
_OTHERS = ("dense", "composed")


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    """Median CPU time of `call` in ms, whatever else the core does, after one call that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        found.append((time.process_time() - start) * 1e3)
    return statistics.median(found)


def plan_rows(repeats: int) -> list[str]:
    """A line of the table per static method: time and size of its plan."""
    rows = []
    for name in [n for n in list_methods() if n not in _OTHERS and (method_class(n).is_static or n == "svg")]:
        for parameters in _VARIANTS.get(name, ({},)):
            method = get_method(name, **parameters)

            def make(method: Any = method) -> BlockPlan:
                for cached in (tile_order, tile_blocks, plans_of_kinds):
                    cached.cache_clear()
                if isinstance(method, SVG):
                    return plans_of_kinds(method, LONG, torch.device("cpu"))
                call = CallContext(LONG)
                method.order(None, None, None, call)
                plan: BlockPlan = method.select(None, None, call)
                return plan

            plan = make()
            what = ", ".join(f"{key}={value}" for key, value in parameters.items()) or "defaults"
            rows.append(
                f"| `{name}` ({what}) | {milliseconds(make, repeats) / 1e3:.2f} s | {size_of(plan) / 1e6:.1f} MB | "
                f"{plan.q_blocks.count} x {plan.k_blocks.count} | {plan.density:.3f} |"
            )
    return rows


def size_of(plan: BlockPlan) -> int:
    """Bytes that a plan holds."""
    box = plan.predicate
    parts = [plan.indices, plan.counts, plan.full_counts]
    parts += [] if box is None else [box.lower, box.upper, box.coordinates]
    return sum(x.numel() * x.element_size() for x in parts if x is not None)


def order_rows(repeats: int, heads: int, dim: int, layers: int) -> list[str]:
    """A line of the table per grid: dense attention, and what order costs per layer in both ways."""
    rows = []
    for grid in GRIDS:
        layout = TokenLayout(grid)
        order = tile_order(layout, _TILE)
        q, k, v = torch.randn(3, 1, heads, layout.tokens, dim).unbind()
        hidden, tables = torch.randn(1, layout.tokens, heads * dim), torch.randn(2, 1, layout.tokens, 1, dim).unbind()
        index, back = order.query, order.inverse

        def each_layer(q: Any = q, k: Any = k, v: Any = v, order: Any = order) -> None:
            order.apply(q, k, v)
            order.restore(q)

        def once(hidden: Any = hidden, tables: Any = tables, index: Any = index, back: Any = back) -> None:
            for x in (hidden, *tables):
                permute_tokens(x, 1, index)
            permute_tokens(hidden, 1, back)

        def attend(q: Any = q, k: Any = k, v: Any = v) -> None:
            F.scaled_dot_product_attention(q, k, v)

        dense = milliseconds(attend, repeats)
        apart, hoisted = milliseconds(each_layer, repeats), milliseconds(once, repeats) / layers
        rows.append(
            f"| {layout.tokens} | {dense:.0f} ms | {apart:.1f} ms ({apart / dense:.2%}) | "
            f"{hoisted:.2f} ms ({hoisted / dense:.3%}) |"
        )
    return rows


def rim_rows(repeats: int, heads: int, dim: int) -> list[str]:
    """A line of the table per method with a rim: attention with its blocks cut token by token, and whole."""
    rows = []
    for name, parameters, grid in _RIMS:
        layout = TokenLayout(grid)
        q, k, v = torch.randn(3, 1, heads, layout.tokens, dim).unbind()
        cells = []
        for rim in ("exact", "whole"):
            order, plan = get_method(name, rim=rim, **parameters).plan(layout, q, k, v)
            ordered = (q, k, v) if order is None else order.apply(q, k, v)

            def attend(ordered: Any = ordered, plan: BlockPlan = plan) -> None:
                block_attention(ordered[0], ordered[1], ordered[2], plan)

            cells.append(f"{milliseconds(attend, repeats):.0f} ms")
        what = ", ".join(f"{key}={value}" for key, value in parameters.items())
        rows.append(f"| `{name}` ({what}) | {' x '.join(map(str, grid))} | {plan.density:.3f} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("docs/results/static_costs.md"), help="page to write")
    parser.add_argument("--repeats", type=int, default=5, help="calls timed, the median counts")
    parser.add_argument("--heads", type=int, default=2, help="heads of the attention that is timed")
    parser.add_argument("--layers", type=int, default=30, help="layers that share a hoisted order")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    software = ", ".join(f"{key} {value}" for key, value in environment().items())
    lines = [
        "# Costs of static methods",
        "",
        f"Made by `python samples/static_costs.py`, {datetime.now(UTC):%Y-%m-%d}, on one core ({software}).",
        "",
        f"## Plans for {LONG.tokens} tokens",
        "",
        "| method | time | plan | blocks | density |",
        "|---|---|---|---|---|",
        *plan_rows(given.repeats),
        "",
        "## Order",
        "",
        f"{given.heads} heads of 128 in fp32, tiles of 4 x 4 x 4. Share of the time of dense attention in brackets.",
        "",
        f"| tokens | dense attention | order in every layer | hoisted, per layer of {given.layers} |",
        "|---|---|---|---|",
        *order_rows(given.repeats, given.heads, 128, given.layers),
        "",
        "## Rims",
        "",
        "Attention with the blocks at the rim cut token by token, and computed whole; the same blocks.",
        "",
        "| method | grid | density | exact | whole |",
        "|---|---|---|---|---|",
        *rim_rows(given.repeats, given.heads, 128),
    ]
    given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
