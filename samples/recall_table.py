"""Recall of every method on the small model: `python samples/recall_table.py`.

One prompt is generated dense; queries and keys of all layers are taken at two steps; every method that can be asked
for a density makes its plan from them, and the share of the attention mass that the plan covers is computed exactly
on sampled query rows. Writes `docs/results/recall.md`, and `docs/methods.md`: the index of all methods, their ranking
where `python samples/rank_methods.py` has made one, and that table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import DitAccelError
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.models import load_pipeline
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.presets import load_preset
from dit_accel.report.records import environment
from dit_accel.samples.captured_attention import Call, captured
from dit_accel.samples.rank_methods import PAIRS
from dit_accel.selection import TopK, generator_for, select_plan
from dit_accel.selection.scores import block_mass, log_mass
from dit_accel.state import CallContext

Planner = Callable[[Tensor, Tensor, CallContext, float], tuple[TokenOrder | None, BlockPlan]]
_BLOCK = 64
_PAGES = ("static", "dynamic", "remainder")
# Besides the defaults: what the published block sizes and gates cost or gain on so small a video.
_VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sparge", {"similarity": -1.0}),
    ("xattention", {"block": 64}),
    ("subblock", {"order": "tile"}),
    ("subblock", {"heads": "adaptive"}),
    ("svg2", {"heads": "adaptive"}),
    ("composed", {"order": "raster"}),
)


@dataclass
class Row:
    """One line of the table: recalls and densities per density asked for, and milliseconds per plan where timed.

    Plans of the first step of a layer, where nothing is kept yet, are timed apart from those of later steps.
    """

    label: str
    recalls: dict[float, list[float]] = field(default_factory=dict)
    densities: dict[float, list[float]] = field(default_factory=dict)
    first: list[float] = field(default_factory=list)
    later: list[float] = field(default_factory=list)

    def cells(self, densities: list[float], dense: float) -> list[str]:
        """Recall, its 5th percentile over heads, and the density, per density; then the cost of choosing."""
        cells = [self.label]
        for asked in densities:
            found = torch.tensor(self.recalls[asked])
            low, density = float(found.quantile(0.05)), statistics.mean(self.densities[asked])
            cells.append(f"{float(found.mean()):.3f} ({low:.2f}) at {density:.3f}")
        if not self.later:
            return [*cells, "", "", ""]
        first, later = statistics.median(self.first), statistics.median(self.later)
        return [*cells, f"{first:.0f}", f"{later:.0f}", f"{100 * later / dense:.0f} %"]


def random_plan(q: Tensor, k: Tensor, call: CallContext, density: float) -> tuple[TokenOrder | None, BlockPlan]:
    """As many blocks in each row, drawn at random."""
    blocks = call.layout.blocks(_BLOCK)
    generator = generator_for(q.device, call.layer, call.step)
    scores = torch.rand(*q.shape[:2], blocks.count, blocks.count, generator=generator)
    return None, select_plan(scores, TopK(share=density), blocks, blocks, call.layout)


def oracle_plan(q: Tensor, k: Tensor, call: CallContext, density: float) -> tuple[TokenOrder | None, BlockPlan]:
    """The blocks of the raster with most exact mass in each row: no choice of as many such blocks covers more."""
    blocks = call.layout.blocks(_BLOCK)
    if "mass" not in call.shared:
        call.shared["mass"], _ = block_mass(q, k, blocks, blocks, call.layout)
    scores = log_mass(call.shared["mass"], torch.ones((), dtype=torch.bool))
    return None, select_plan(scores, TopK(share=density), blocks, blocks, call.layout)


def by_method(name: str, parameters: dict[str, Any]) -> Planner:
    """Plans of a registered method."""

    def plan(q: Tensor, k: Tensor, call: CallContext, density: float) -> tuple[TokenOrder | None, BlockPlan]:
        return get_method(name, density=density, **parameters).plan(call.layout, q, k, None, call)

    return plan


def planners() -> Iterator[tuple[str, Planner]]:
    """Random, the oracle, every method that takes a density, and some variants."""
    yield "random", random_plan
    yield "oracle (raster)", oracle_plan
    variants = list(_VARIANTS)
    for name in list_methods():
        if "density" in method_class(name).parameters():
            yield name, by_method(name, {})
        for base, parameters in [v for v in variants if v[0] == name]:
            text = ", ".join(f"{key}={value}" for key, value in parameters.items())
            yield f"{base} {text}", by_method(base, parameters)


def measure(label: str, plan: Planner, calls: list[Call], densities: list[float], rows: int) -> Row:
    """Recall, density and time of one method over all captured calls; what it keeps is carried from step to step."""
    row = Row(label)
    shared: list[dict[str, Any]] = [{} for _ in calls]
    for density in densities:
        row.recalls[density], row.densities[density] = [], []
        memories: dict[int, dict[str, Any]] = {}
        for call, common in zip(calls, shared, strict=True):
            times = row.later if call.layer in memories else row.first
            memory, (q, k, _) = memories.setdefault(call.layer, {}), call.qkv
            context = CallContext(call.layout, call.layer, call.step, memory=memory, shared=common)
            begun = time.perf_counter()
            order, made = plan(q, k, context, density)
            if plan is not oracle_plan:
                times.append((time.perf_counter() - begun) * 1e3)
            q, k = (q, k) if order is None else order.apply(q, k, k)[:2]
            row.recalls[density] += made.recall(q, k, rows=rows).flatten().tolist()
            row.densities[density].append(made.density)
    return row


def capture(name: str, model: str | None, prompt: str, seed: int, steps: int) -> tuple[list[Call], str]:
    """Queries and keys at a quarter and three quarters of `steps` steps, and a line that says of what."""
    preset = load_preset(name)
    pipe = load_pipeline(model or preset.repository)
    generation = preset.generation.model_copy(update={"num_inference_steps": steps})
    taken = sorted({steps // 4, 3 * steps // 4})
    calls = captured(pipe, generation, prompt, seed, taken)
    layers, heads = len({call.layer for call in calls}), calls[0].qkv[0].shape[1]
    at = f"steps {' and '.join(map(str, taken))} of {steps}, {layers} layers of {heads} heads, "
    at += f"grid {calls[0].layout.grid}"
    return calls, f'preset {preset.name}, "{prompt}", seed {seed}: {at}'


def dense_milliseconds(call: Call) -> float:
    """Median time of PyTorch's dense attention on the captured shape."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        F.scaled_dot_product_attention(*call.qkv)
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--prompt", default="a red ball moving right")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--steps", type=int, default=8, help="of the generation that queries and keys are taken from")
    parser.add_argument("--rows", type=int, default=128, help="query rows per call on which recall is computed")
    parser.add_argument("--methods", nargs="+", default=None, help="lines to measure and print, no page")
    parser.add_argument("--output", type=Path, default=Path("docs/results/recall.md"))
    parser.add_argument("--index", type=Path, default=Path("docs/methods.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    calls, source = capture(arguments.preset, arguments.model, arguments.prompt, arguments.seed, arguments.steps)
    dense = dense_milliseconds(calls[0])
    head = ["method", *(f"{100 * d:g} %" for d in arguments.densities), "ms, first", "ms, later", "of dense"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for label, plan in planners():
        if arguments.methods and not label.startswith(tuple(arguments.methods)):
            continue
        try:
            row = measure(label, plan, calls, arguments.densities, arguments.rows)
            lines.append("| " + " | ".join(row.cells(arguments.densities, dense)) + " |")
        except DitAccelError as error:
            lines.append(f"| {label} | {error} |" + " |" * (len(head) - 2))
        print(lines[-1], flush=True)
    if arguments.methods:
        return
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    made = [*_preamble(source, dense), *lines, ""]
    arguments.output.write_text("\n".join(["# Recall of selections on the small model", "", *made]), encoding="utf-8")
    page = [*index(), *ranking(), "## Recall on the small model", "", *made]
    arguments.index.write_text("\n".join(page), encoding="utf-8")


def index() -> list[str]:
    """All methods with a link to what is said about them."""
    lines = [
        "# All methods",
        "",
        "Made by `python samples/recall_table.py` from the registry. `dit-accel methods show NAME` prints the",
        "parameters of a method; [adding a method](adding-a-method.md) says how to write one.",
        "",
        "| name | what it does | source | more |",
        "|---|---|---|---|",
    ]
    for name in list_methods():
        about = method_class(name)
        page = next((p for p in _PAGES if f"`{name}`" in Path(f"docs/methods/{p}.md").read_text("utf-8")), None)
        link = "" if page is None else f"[{page}](methods/{page}.md)"
        lines.append(f"| `{name}` | {(about.__doc__ or '').strip().splitlines()[0]} | {about.source} | {link} |")
    return [
        *lines,
        "",
        "What is closest to dense is judged by renders paired with dense attention on the same dense kernel, over at",
        "least 16 prompts: `python samples/rank_methods.py` makes that ranking (closeness, prompt following and time).",
        "Recall is a unit test beside it.",
        "",
    ]


def ranking(path: Path = Path("docs/results/ranking.md")) -> list[str]:
    """The pairs of the ranking by renders, and a link to the rest; nothing where it was not made."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    pairs = text[text.index(PAIRS) + len(PAIRS) :].strip()
    made = f"Renders of the small model paired with dense, closest first; [the whole table](results/{path.name})."
    return ["## Ranking by paired renders", "", made, "", *pairs.splitlines(), ""]


def _preamble(source: str, dense: float) -> list[str]:
    command = " ".join(["python samples/recall_table.py", *sys.argv[1:]])
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    return [
        f"Made by `{command}`, {time.strftime('%Y-%m-%d')}.",
        "",
        versions,
        "",
        f"Queries and keys of {source}.",
        "",
        "A cell is the share of the true attention mass that the plan covers, mean over heads (5th percentile), and",
        "the density that the plan has: methods round to whole blocks, and some keep more than was asked for.",
        "The last columns are the median time to order and select in the first step and in later ones, and the share",
        f"of the latter in dense attention ({dense:.0f} ms).",
        "",
        "Recall is a unit test, not a verdict: what covers more mass does not always look better. Methods are ranked",
        "by renders paired with dense, not by this table.",
        "",
    ]


if __name__ == "__main__":
    main()
