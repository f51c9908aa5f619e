"""Pictures of real heads of the small model: `python samples/attention_maps.py`.

Queries and keys of a few generations are taken from the running pipeline. Each head is called local, temporal, global
or sink by where its attention mass lies, and the share of it that block plans cover is compared between the kinds.
Writes `docs/attention-maps.md` and its picture.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.report.records import environment
from dit_accel.samples.captured_attention import Call
from dit_accel.samples.recall_table import Planner, by_method, capture, measure, oracle_plan
from dit_accel.selection.scores import block_mass

KINDS = ("local", "temporal", "sink", "global")
NEAR, PLACE = 2, 1  # tokens in space: what is near in the next frame, and what is the same place in other frames
SINK_SHARE = 0.01  # of the keys
LEAST_EXCESS = 0.05  # of the mass, above that of uniform attention
_ROWS, _BLOCK = 256, 64
_PROMPTS = ("a red ball moving right", "a blue star moving up left on a white background")
_PLANS: tuple[tuple[str, Planner], ...] = (
    ("oracle", oracle_plan),
    ("composed", by_method("composed", {})),
    ("radial", by_method("radial", {})),
)


@dataclass(frozen=True)
class Head:
    """One head and where its mass lies.

    Args:
        layer, index: which.
        excess: per kind but "global", the share of the mass beyond that of uniform attention.
        spread: exp(entropy) of the rows over the number of keys: 1 for uniform attention.
    """

    layer: int
    index: int
    excess: dict[str, float]
    spread: float

    @property
    def kind(self) -> str:
        """The kind with the largest excess; "global" where none reaches `LEAST_EXCESS`."""
        best = max(self.excess, key=lambda kind: self.excess[kind])
        return best if self.excess[best] >= LEAST_EXCESS else "global"


def regions(layout: TokenLayout, rows: Tensor) -> dict[str, Tensor]:
    """Which keys are local and which temporal for some queries, bool `[rows, N]` each; no key is both.

    Args:
        layout: of a video.
        rows: tokens, int `[rows]`.
    """
    at = layout.coordinates
    apart = (at[rows][:, None] - at[None]).abs()
    frames, space = apart[..., 0], apart[..., 1:].amax(-1)
    return {
        "local": (frames == 0) | ((frames == 1) & (space <= NEAR)),
        "temporal": (frames >= 2) & (space <= PLACE),
    }


def excess_mass(call: Call, rows: int = _ROWS, seed: int = 0) -> tuple[dict[str, Tensor], Tensor]:
    """Excess of every head per kind, and its spread, `[H]` each, exact on sampled rows.

    The keys of a sink are found on one half of the rows and weighed on the other: any head has large columns in the
    rows that they were chosen by.
    """
    q, k, _ = call.qkv
    drawn = torch.randperm(q.shape[2], generator=torch.Generator().manual_seed(seed))[:rows]
    weights = (q[0][:, drawn].float() @ k[0].float().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    found = {}
    for kind, inside in regions(call.layout, drawn).items():
        found[kind] = (weights * inside).sum(-1).mean(-1) - inside.float().mean()
    half, count = len(drawn) // 2, max(1, round(SINK_SHARE * k.shape[2]))
    top = weights[:, :half].mean(1).topk(count, dim=-1).indices
    found["sink"] = weights[:, half:].mean(1).gather(-1, top).sum(-1) - count / k.shape[2]
    entropy = -torch.special.xlogy(weights, weights).sum(-1)
    return found, entropy.exp().mean(-1) / k.shape[2]


def classify(calls: Sequence[Call]) -> dict[tuple[int, int], Head]:
    """Every head by (layer, index), its figures averaged over the calls of its layer."""
    heads = {}
    for layer in sorted({call.layer for call in calls}):
        own = [excess_mass(call) for call in calls if call.layer == layer]
        mean = {kind: torch.stack([found[kind] for found, _ in own]).mean(0).tolist() for kind in own[0][0]}
        spread = torch.stack([one for _, one in own]).mean(0).tolist()
        for index, width in enumerate(spread):
            heads[layer, index] = Head(layer, index, {kind: mean[kind][index] for kind in mean}, width)
    return heads


def recalls(
    calls: Sequence[Call], heads: dict[tuple[int, int], Head], densities: Sequence[float], rows: int
) -> dict[tuple[str, float, str], list[float]]:
    """Recall of every head and call, by (plan, density, kind of head)."""
    kinds = [heads[call.layer, index].kind for call in calls for index in range(call.qkv[0].shape[1])]
    found: dict[tuple[str, float, str], list[float]] = {}
    for label, plan in _PLANS:
        row = measure(label, plan, list(calls), list(densities), rows)
        for density in densities:
            for kind, value in zip(kinds, row.recalls[density], strict=True):
                found.setdefault((label, density, kind), []).append(value)
    return found


def examples(heads: dict[tuple[int, int], Head]) -> list[Head]:
    """The head with most of its kind, for each kind that there is: excess, or spread where the kind is global."""
    chosen = []
    for kind in KINDS:
        own = [head for head in heads.values() if head.kind == kind]
        if own:
            strengths = [head.excess.get(kind, head.spread) for head in own]
            chosen.append(own[strengths.index(max(strengths))])
    return chosen


def draw(path: Path, shown: Sequence[Head], calls: Sequence[Call]) -> None:
    """One line of pictures per head: mass between blocks, and the weights of one query on the frames of the video."""
    figure = Figure(figsize=(10, 2.1 * len(shown)), layout="constrained", dpi=110)
    axes = figure.subplots(len(shown), 2, width_ratios=(1, 4), squeeze=False)
    for head, (left, right) in zip(shown, axes, strict=True):
        call = [call for call in calls if call.layer == head.layer][-1]
        q, k, _ = (x[:, head.index : head.index + 1] for x in call.qkv)
        blocks = call.layout.blocks(_BLOCK)
        mass = block_mass(q, k, blocks, blocks, call.layout)[0][0, 0]
        left.imshow((mass / mass.sum(-1, keepdim=True)).clamp_min(1e-5).log10().numpy(), cmap="magma")
        left.set(title=f"{head.kind}: layer {head.layer}, head {head.index}", xticks=[], yticks=[])
        right.imshow(query_picture(call.layout, q[0, 0], k[0, 0]).numpy(), cmap="magma")
        right.set(xticks=[], yticks=[])
    axes[-1][0].set(xlabel="keys, blocks of 64", ylabel="queries")
    axes[-1][1].set(xlabel="weights of the query in the middle of the middle frame, frame by frame")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def query_picture(layout: TokenLayout, q: Tensor, k: Tensor) -> Tensor:
    """The weights of the middle query on all frames side by side, log10, `[2 h + 1, ceil(T / 2) (w + 1)]`.

    Args:
        layout: of a video `(T, h, w)`.
        q, k: of one head, `[N, D]`.
    """
    frames, height, width = layout.grid
    middle = (frames // 2 * height + height // 2) * width + width // 2
    weights = (k.float() @ q[middle].float() * q.shape[-1] ** -0.5).softmax(0).clamp_min(1e-7).log10()
    tiles = weights.view(frames, height, width)
    columns = -(-frames // 2)
    picture = torch.full((2 * height + 1, columns * (width + 1) - 1), torch.nan)
    for frame, tile in enumerate(tiles):
        top, left = frame // columns * (height + 1), frame % columns * (width + 1)
        picture[top : top + height, left : left + width] = tile
    return picture


def page(
    heads: dict[tuple[int, int], Head],
    found: dict[tuple[str, float, str], list[float]],
    densities: Sequence[float],
    sources: Sequence[str],
    picture: str,
) -> list[str]:
    """Lines of the page, `picture` relative to it."""
    kinds = [kind for kind in KINDS if any(head.kind == kind for head in heads.values())]
    lines = [
        "# Attention maps of the small model",
        "",
        f"Made by `{' '.join(['python samples/attention_maps.py', *sys.argv[1:]])}`, {time.strftime('%Y-%m-%d')}.",
        "",
        ", ".join(f"{name} {value}" for name, value in environment().items()),
        "",
        *(f"- {source}" for source in sources),
        "",
        f"![One head of each kind]({picture})",
        "",
        "Left: mass between blocks of 64 tokens of the raster. Right: where the query in the middle of the middle",
        "frame looks, all frames in two lines. Both logarithmic.",
        "",
        "## Kinds",
        "",
        "A head is what most of its mass is, beyond what uniform attention would have there; if no kind has",
        f"{LEAST_EXCESS:.0%} of the mass more, it is global. Exact on {_ROWS} sampled queries per call, mean of all",
        "calls of its layer.",
        "",
        f"- local: keys of the query's own frame, and those at most {NEAR} tokens away in the frames next to it",
        f"- temporal: keys at the query's place, or {PLACE} token beside it, in frames further away",
        f"- sink: the {SINK_SHARE:.0%} of the keys that all queries look at most, found on one half of the sampled",
        "  queries and weighed on the other",
        "- global: none of these",
        "",
        "Spread is the exponential of the entropy over the number of keys: 1 for uniform attention.",
        "",
        "| layer | head | local | temporal | sink | spread | kind |",
        "|---|---|---|---|---|---|---|",
    ]
    for head in heads.values():
        cells = " | ".join(f"{head.excess[kind]:+.3f}" for kind in KINDS[:3])
        lines.append(f"| {head.layer} | {head.index} | {cells} | {head.spread:.2f} | {head.kind} |")
    titles = [f"{label} {100 * density:g} %" for label, _ in _PLANS for density in densities]
    lines += [
        "",
        "## Recall by kind",
        "",
        "Share of the true attention mass that a plan covers at a density, mean over heads and calls. The oracle takes",
        "the blocks of the raster with most mass; `composed` estimates them from block means in tiles; `radial` looks",
        "at positions alone.",
        "",
        "| kind | heads | " + " | ".join(titles) + " |",
        "|" + "---|" * (len(titles) + 2),
    ]
    for kind in kinds:
        count = sum(head.kind == kind for head in heads.values())
        values = [f"{statistics.mean(found[label, d, kind]):.3f}" for label, _ in _PLANS for d in densities]
        lines.append(f"| {kind} | {count} | " + " | ".join(values) + " |")
    missing = [kind for kind in KINDS if kind not in kinds]
    if missing:
        lines += ["", f"No head of this model is {' or '.join(missing)}."]
    return [*lines, ""]


def main() -> None:
    """Capture, classify, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--prompts", nargs="+", default=list(_PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8, help="of the generations that queries and keys are taken from")
    parser.add_argument("--densities", type=float, nargs="+", default=[0.125, 0.25, 0.5])
    parser.add_argument("--rows", type=int, default=128, help="query rows per call on which recall is computed")
    parser.add_argument("--output", type=Path, default=Path("docs/attention-maps.md"))
    arguments = parser.parse_args()
    calls, sources = [], []
    for number, prompt in enumerate(arguments.prompts):
        seed = arguments.seed + number
        found, source = capture(arguments.preset, arguments.model, prompt, seed, arguments.steps)
        calls += found
        sources.append(source)
    write(arguments.output, calls, sources, arguments.densities, arguments.rows)


def write(output: Path, calls: Sequence[Call], sources: Sequence[str], densities: Sequence[float], rows: int) -> None:
    """Write the page and, in `images` beside it, its picture."""
    heads = classify(calls)
    picture = output.parent / "images" / f"{output.stem}.png"
    draw(picture, examples(heads), calls)
    found = recalls(calls, heads, densities, rows)
    lines = page(heads, found, densities, sources, f"images/{picture.name}")
    output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
