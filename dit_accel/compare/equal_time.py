"""Presets of different speed compared at equal time: along the line through presets of one kind at several budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any


@dataclass(frozen=True)
class AtEqualTime:
    """A candidate beside the presets of a line, at its own time.

    Args:
        candidate: its label.
        ratio: median of dense time over its time.
        psnr: median over the prompts, dB.
        line_psnr: median of the PSNR on the line at that time; None where no preset of the line is as fast.
        gain: median over the prompts of what the line is closer by, dB; None likewise.
        wins: prompts on which the line is closer.
        prompts: of all.
        is_same: some preset of the line makes the very same pictures.
    """

    candidate: str
    ratio: float
    psnr: float
    line_psnr: float | None
    gain: float | None
    wins: int
    prompts: int
    is_same: bool = False


def at_equal_time(rows: Sequence[Mapping[str, Any]], line: Sequence[str], others: Sequence[str]) -> list[AtEqualTime]:
    """Compare each of `others` with the presets of `line` at its own speed.

    Between two presets of the line PSNR is interpolated over the ratio, prompt by prompt. A candidate that is slower
    than all of them is compared with the slowest, which then takes less time than it; one that is faster than all of
    them is compared with none.

    Args:
        rows: one per prompt and candidate, with "prompt", "seed", "candidate", "ratio" and "psnr"; every candidate has
            all prompts.
        line: labels of the presets of the line, at least one.
        others: labels of the candidates.
    """
    by_label: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: (row["seed"], row["prompt"])):
        by_label.setdefault(row["candidate"], []).append(row)
    speed = {name: median(row["ratio"] for row in by_label[name]) for name in (*line, *others)}
    near = {name: [row["psnr"] for row in by_label[name]] for name in (*line, *others)}
    points = sorted((speed[name], near[name]) for name in line)
    found = []
    for name in others:
        there = _on_line(points, speed[name])
        gains = [] if there is None else [a - b for a, b in zip(there, near[name], strict=True)]
        found.append(
            AtEqualTime(
                candidate=name,
                ratio=speed[name],
                psnr=median(near[name]),
                line_psnr=None if there is None else median(there),
                gain=median(gains) if gains else None,
                wins=sum(gain > 0 for gain in gains),
                prompts=len(near[name]),
                is_same=any(near[name] == psnr for _, psnr in points),
            )
        )
    return found


def _on_line(points: Sequence[tuple[float, list[float]]], ratio: float) -> list[float] | None:
    """PSNR per prompt at `ratio` on the line through `points`, which ascend in their ratio."""
    if ratio > points[-1][0]:
        return None
    for (slow, a), (fast, b) in pairwise(points):
        if slow <= ratio <= fast:
            weight = (ratio - slow) / max(fast - slow, 1e-12)
            return [(1 - weight) * x + weight * y for x, y in zip(a, b, strict=True)]
    return points[0][1]


def equal_time_table(found: Sequence[AtEqualTime], what: str) -> str:
    """The table in Markdown, and the verdict in one sentence. `what`: how the presets of the line are called."""
    text = [f"| uniform | ratio | PSNR dB | {what} at that time | closer by | on prompts |", "|---" * 6 + "|"]
    for row in found:
        cells = [row.candidate, f"{row.ratio:.2f}x", f"{row.psnr:.2f}"]
        if row.is_same:
            cells += ["the same preset", "", ""]
        elif row.line_psnr is None or row.gain is None:
            cells += [f"none is as fast as {row.ratio:.2f}x", "", ""]
        else:
            cells += [f"{row.line_psnr:.2f}", f"{row.gain:+.2f} dB", f"{row.wins} of {row.prompts}"]
        text.append(f"| {' | '.join(cells)} |")
    judged = [row for row in found if row.gain is not None and not row.is_same]
    lost = [row.candidate for row in judged if row.gain is not None and row.gain <= 0]
    same = [row.candidate for row in found if row.is_same]
    fast = [row.candidate for row in found if row.gain is None and not row.is_same]
    verdict = f"At equal time the {what} presets are closer to dense than {len(judged) - len(lost)} of {len(judged)} "
    verdict += "uniform presets"
    verdict += f"; not closer than {', '.join(lost)}" if lost else ""
    verdict += f"; the same as one of them: {', '.join(same)}" if same else ""
    verdict += f"; not compared, for they are faster than every {what} preset: {', '.join(fast)}" if fast else ""
    return "\n".join([*text, "", verdict + "."]) + "\n"
