"""A comparison that goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dit_accel.compare.candidates import Candidate
from dit_accel.compare.runner import Task, run_all
from dit_accel.presets import Generation

Rows = list[dict[str, Any]]


def resumed(
    pipe: Any,
    generation: Generation,
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    path: Path,
    key: str,
    tell: Callable[[str], None],
    ends: float = float("inf"),
    inputs: dict[str, Any] | None = None,
) -> Iterator[Rows]:
    """The rows of one task after the other: those that a file holds, then the others, which are added to it.

    Args:
        pipe, generation, candidates, inputs: as for `run_all`.
        tasks: of a longer list the same first ones make the same rows.
        path: file of the rows, `.jsonl`; rows of other candidates, generations or keys are replaced.
        key: what else the rows depend on, such as the weights.
        tell: called with one line after each task.
        ends: no task begins that would end later than this, in seconds of `time.monotonic`. The first one always does.
    """
    what = [[c.label, c.method.name, c.method.model_dump_json(), c.schedule.model_dump_json()] for c in candidates]
    head = json.dumps([key, generation.model_dump(mode="json"), what])
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines[1:]] if lines[:1] == [head] else []
    done = done[: len(tasks)]
    yield from done
    if len(done) == len(tasks):
        return
    path.write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, done))), encoding="utf-8")
    begun = time.monotonic()
    for number, (_, rows) in enumerate(run_all(pipe, generation, tasks[len(done) :], candidates, inputs=inputs), 1):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows, default=float) + "\n")
        yield rows
        each = (time.monotonic() - begun) / number
        tell(f"compared on {len(done) + number} of {len(tasks)} prompts, {each:.0f} s each")
        if time.monotonic() + each > ends and len(done) + number < len(tasks):
            tell("the time is up; start the command again to go on")
            return
