"""What a run on a GPU leaves behind, row by row, so that a run that is cut short has kept what it measured."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dit_accel.bench.gpu_checks import CheckRow
from dit_accel.bench.gpu_timings import SpeedRow
from dit_accel.bench.options import TIME_IS_UP

_GOAL_OF_EFFICIENCY, _GOAL_OF_REST, _GOAL_OF_INT8, _GOAL_OF_STEPS = 0.85, 0.10, 1.2, 0.05
_FORMATS = {
    "error": ".2g", "budget": ".2g", "density": ".1%", "ms": ".3f", "dense_ms": ".2f", "ratio": ".2f", "rate": ".3g",
    "efficiency": ".2f", "extra": "+.0%", "share": ".1%",
}  # fmt: skip


class Record:
    """The folder of one run: `checks.csv`, `times.csv`, `results.json` and `summary.md`, up to date after every row.

    Args:
        folder: made where it is missing; files of an earlier run in it are replaced.
        common: what holds for all rows: date, device, versions, command.
        checks, timings: how many tasks there are of each kind.
    """

    def __init__(self, folder: Path, common: Mapping[str, str], checks: int, timings: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._common, self._tasks = folder, dict(common), (checks, timings)
        self.checks: list[dict[str, Any]] = []
        self.times: list[dict[str, Any]] = []
        for name, kind in (("checks.csv", CheckRow), ("times.csv", SpeedRow)):
            self._append(name, [field.name for field in fields(kind)], "w")

    def check(self, row: dict[str, Any]) -> None:
        """Enter a row of the checks."""
        self.checks.append(row)
        self._append("checks.csv", row.values())
        if row["status"] == "failed":
            print(f"FAILED {row['kind']} {row['name']} {row['tile']}: {row['note']}", flush=True)
        self._write()

    def speed(self, row: dict[str, Any]) -> None:
        """Enter a row of the timings."""
        self.times.append(row)
        self._append("times.csv", row.values())
        print(_cells(row, _columns(SpeedRow)).strip("| "), flush=True)
        self._write()

    @property
    def exit_code(self) -> int:
        """0: every check passed; 1: one failed; 2: the time was up before all of them ran."""
        if any(row["status"] == "failed" for row in self.checks):
            return 1
        return 2 if any(row["note"] == TIME_IS_UP for row in self.checks) else 0

    def summary(self) -> str:
        """The page that says what came out, most important first."""
        counts = Counter(row["status"] for row in self.checks)
        told = ", ".join(f"{counts[status]} {status}" for status in ("passed", "failed", "left out"))
        lines = [
            "# Kernels on a GPU",
            "",
            ", ".join(f"{name} {value}" for name, value in self._common.items()),
            "",
            f"Checks: {told}, of {self._tasks[0]}. Timings: {len(self.times)} rows.",
            "",
            *(f"- {line}" for line in self._goals()),
            "",
        ]
        bad = [row for row in self.checks if row["status"] != "passed"]
        for title, rows, kind in (("Checks that did not pass", bad, CheckRow), ("Times", self.times, SpeedRow)):
            if rows:
                names = _columns(kind)
                lines += [f"## {title}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
                lines += [*(_cells(row, names) for row in rows), ""]
        return "\n".join(lines)

    def _goals(self) -> list[str]:
        """Each figure that was aimed at, beside what was measured."""
        kernels = [row for row in self.times if row["kind"] == "kernel" and row["ms"] is not None]
        exact = [row for row in kernels if row["what"].startswith("exact") and row["density"] >= 0.1]
        rest = [row for row in kernels if row["extra"] is not None and row["density"] == 0.125]
        eight = [row for row in rest if row["what"].startswith("int8")]
        rest = [row for row in rest if not row["what"].startswith("int8")]
        plans = [row for row in self.times if row["share"] is not None and "scores to plan" in row["what"]]
        return [
            _goal("rate per selected pair of exact blocks, share of dense, at density 10 % and more", exact,
                  "efficiency", _GOAL_OF_EFFICIENCY, True),
            _goal("time of a remainder beyond exact blocks, at density 12.5 %", rest, "extra", _GOAL_OF_REST, False),
            _goal("time of 8-bit operands beyond exact blocks, at density 12.5 %", eight, "extra",
                  1 / _GOAL_OF_INT8 - 1, False),
            _goal("time from scores to a plan, share of attention at density 12.5 %", plans, "share",
                  _GOAL_OF_STEPS, False),
        ]  # fmt: skip

    def _append(self, name: str, cells: Iterable[Any], mode: str = "a") -> None:
        with (self._folder / name).open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(["" if cell is None else cell for cell in cells])

    def _write(self) -> None:
        """JSON and Markdown, each put in place whole."""
        everything = {"about": self._common, "checks": self.checks, "times": self.times}
        for name, text in (("results.json", json.dumps(everything, indent=1)), ("summary.md", self.summary())):
            part = self._folder / f"{name}.part"
            part.write_text(text, encoding="utf-8")
            part.replace(self._folder / name)


def _goal(what: str, rows: list[dict[str, Any]], key: str, goal: float, is_least: bool) -> str:
    """The goal, and the range that was found."""
    aim = f"{'at least' if is_least else 'at most'} {goal:.2f}"
    values = sorted(row[key] for row in rows if row[key] is not None)
    if not values:
        return f"{what}: aimed at {aim}, not measured"
    met = sum(value >= goal if is_least else value <= goal for value in values)
    return f"{what}: aimed at {aim}, found {values[0]:.2f} to {values[-1]:.2f}; {met} of {len(values)} calls meet it"


def _columns(kind: type[CheckRow] | type[SpeedRow]) -> list[str]:
    return [field.name for field in fields(kind)]


def _cells(row: Mapping[str, Any], names: Iterable[str]) -> str:
    cells = ("" if row[name] in (None, "") else format(row[name], _FORMATS.get(name, "")) for name in names)
    return f"| {' | '.join(cells)} |"
