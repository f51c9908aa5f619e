"""What choosing blocks costs beside the attention it saves: `python samples/bench_selection.py`.

Queries, keys and values of the small model, taken from one short generation, go through every method that looks at
them, in interleaved rounds with dense attention. Writes a table of CPU times on one thread to
docs/results/selection-cost.md.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dit_accel.bench.table import stamp
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.models import load_pipeline
from dit_accel.presets import load_preset
from dit_accel.samples.captured_attention import Call, captured, clocked
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext

BAR = 0.1
STEPS = 50
# The schedules that methods define themselves or are made for; all others choose anew at every sparse step.
SCHEDULES: dict[str, dict[str, Any]] = {
    "adaspa": {"dense_steps": 11, "search_steps": [10, 30]},
    "sparsed": {"dense_steps": 12, "search_steps": [11]},
    "svg2": {"dense_steps": 10, "refresh": 2},
}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("subblock", {}),
    ("sparge", {"similarity": -1.0}),
    ("sparge", {}),
    ("xattention", {}),
    ("xattention", {"stride": 8}),
    ("adaspa", {}),
    ("sparsed", {}),
    ("svg2", {}),
    ("vmoba", {}),
    ("psa", {}),
    ("asa", {}),
    ("flexprefill", {}),
    ("proxyattn", {}),
    ("pisa", {}),
    ("draft", {}),
    ("aurora", {}),
    ("aurora", {"renew": 1, "across_branches": False}),
)


@dataclass
class Cost:
    """Milliseconds of one method: its first choice on a layer, later ones, putting tokens in order, and attention."""

    method: Method
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)
    moving: list[float] = field(default_factory=list)
    attending: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)

    def run(self, call: Call, memory: dict[str, Any]) -> None:
        """One call, as the engine makes it."""
        context = CallContext(call.layout, call.layer, call.step, memory=memory, branches=memory)
        choices = self.later if memory.get("known") else self.first
        memory["known"] = True
        ordering, order = clocked(lambda: self.method.order(*call.qkv, context))
        moving, qkv = clocked(lambda: call.qkv if order is None else order.apply(*call.qkv))
        context.values = qkv[2]
        selecting, plan = clocked(lambda: self.method.select(*qkv[:2], context))
        attending, out = clocked(lambda: self.method.compute(*qkv, plan, context))
        restoring, _ = clocked(lambda: out if order is None else order.restore(out))
        choices.append(ordering + selecting)
        # A pipeline puts tokens into such an order once per forward pass, and not in every layer.
        self.moving.append(0.0 if self.method.has_static_order else moving + restoring)
        self.attending.append(attending)
        self.densities.append(plan.density + context.extra_density)

    def row(self, label: str, dense: float) -> list[str]:
        """Cells of the table."""
        first, later, moving, attending = (
            statistics.median(x) for x in (self.first, self.later, self.moving, self.attending)
        )
        saved = dense - attending
        spread, text = self._spread(first, later)
        spread += moving
        cells = [label, f"{statistics.mean(self.densities):.3f}", *(f"{x:.1f}" for x in (first, later, moving, saved))]
        if saved <= 0:
            return [*cells, "-", text or "every step", "saves nothing", "-"]
        verdict = "met" if spread / saved < BAR else "**missed**"
        return [*cells, f"{(later + moving) / saved:.3f}", text or "every step", f"{spread / saved:.3f}", verdict]

    def _spread(self, first: float, later: float) -> tuple[float, str]:
        """Milliseconds of choosing per call, and what spreads them: a schedule, or an order that is kept."""
        renew, branches = getattr(self.method, "renew", 1), 1 + getattr(self.method, "across_branches", False)
        if (calls := renew * branches) > 1:
            # `first` makes the order; the calls that share it are `later`, though a second branch chooses nothing.
            return (first + later * (calls - 1)) / calls, f"order every {renew} steps, for {branches} branches"
        rule = SCHEDULES.get(self.method.name, {"dense_steps": 10})
        plans, sparse = plans_made(Schedule.make(**rule))
        text = ", ".join(f"{name} {value}" for name, value in rule.items() if name != "dense_steps")
        return (first + later * (plans - 1)) / sparse, text


def plans_made(schedule: Schedule, steps: int = STEPS) -> tuple[int, int]:
    """How many plans a schedule makes per layer in a run of `steps` steps, and for how many sparse steps."""
    made: int | None = None
    plans = sparse = 0
    for step in range(steps):
        is_sparse = schedule.dense_reason(0, step, 0.5, 1) is None
        sparse += is_sparse
        if (is_sparse or schedule.searches(0, step, 1)) and (made is None or not schedule.keeps(made, step)):
            made, plans = step, plans + 1
    return plans, sparse


def measure(calls: list[Call], density: float, rounds: int) -> tuple[float, list[tuple[str, Cost]]]:
    """Median time of dense attention, and the cost of every method, in interleaved rounds over the calls."""
    costs = []
    for name, parameters in METHODS:
        text = " ".join([name, *(f"{key}={value}" for key, value in parameters.items())])
        costs.append((text, Cost(get_method(name, density=density, **parameters))))
    dense: list[float] = []
    memories: list[dict[int, dict[str, Any]]] = [{} for _ in costs]
    for number in range(rounds):
        for call in calls:
            seen = replace(call, step=call.step + number)
            dense.append(clocked(partial(F.scaled_dot_product_attention, *call.qkv))[0])
            for (_, cost), memory in zip(costs, memories, strict=True):
                cost.run(seen, memory.setdefault(call.layer, {}))
    return statistics.median(dense), costs


def page(calls: list[Call], density: float, dense: float, costs: list[tuple[str, Cost]]) -> str:
    """The page of results."""
    shape, grid = calls[0].qkv[0].shape, "x".join(map(str, calls[0].layout.grid))
    head = ["method", "density", "first", "later", "moving", "saved", "per call", "chosen", "amortised", "under 0.1"]
    lines = [
        "# What choosing blocks costs",
        "Made by `" + shlex.join(["python", "samples/bench_selection.py", *sys.argv[1:]]) + "`.",
        ", ".join(f"{name} {value}" for name, value in stamp().items()),
        f"Queries, keys and values of preset tiny-wan: {len(calls)} layers, {shape[1]} heads, grid {grid} = {shape[2]} "
        f"tokens, head size {shape[3]}, {str(calls[0].qkv[0].dtype)[6:]}; asked for density {density}. Dense attention "
        f"takes {dense:.0f} ms.",
        "Medians in milliseconds of CPU time: **first** choice (order and blocks) on a layer, where nothing is kept "
        "yet; **later** choices; **moving** q, k, v and the output in and out of an order that depends on them (one "
        "that depends on the layout alone is applied once per forward pass); attention time **saved**. "
        "**Per call** is (later + moving) / saved. **Amortised** spreads the choices over the sparse steps of "
        f"{STEPS} steps under the schedule in **chosen**, which is the method's own or the one it is made for; that is "
        "what must stay under 0.1.",
        "\n".join(
            ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            + ["| " + " | ".join(cost.row(label, dense)) + " |" for label, cost in costs]
        ),
        "The share falls with the length: saved time grows with its square, block means with the length itself, and "
        "the samples and searches keep their ratio.",
    ]
    return "\n\n".join(lines) + "\n"


def main() -> None:
    """Capture, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default="a red ball moving right")
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=3, help="at least 2: the first fills what methods keep")
    parser.add_argument("--out", type=Path, default=Path("docs/results/selection-cost.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset = load_preset("tiny-wan")
    # Four steps are enough for queries and keys of a real model, and take seconds.
    short = preset.generation.model_copy(update={"num_inference_steps": 4})
    calls = captured(load_pipeline(preset.repository), short, arguments.prompt, 0, [2])
    text = page(calls, arguments.density, *measure(calls, arguments.density, max(2, arguments.rounds)))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
