"""How much the picture changes when a few layers err in a few steps: measured, one generation per part of both."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dit_accel.acceleration import accelerate
from dit_accel.calibrate.statistics import Statistics, layer_parts
from dit_accel.generation import call_pipeline
from dit_accel.schedule import Schedule

if TYPE_CHECKING:
    from dit_accel.calibrate.run import Plan


def probe(
    pipe: Any,
    plan: Plan,
    held: Statistics,
    path: Path,
    tell: Callable[[str], None],
    inputs: dict[str, Any] | None = None,
    clips: dict[int, np.ndarray] | None = None,
) -> Statistics:
    """Make the probes that `held` lacks, and write it to `path` after each.

    Every prompt is generated with one candidate in a part of the layers and a range of steps, and dense elsewhere; kept
    is the mean squared difference of the pictures from the dense ones.

    Args:
        pipe, plan, path, tell, inputs: as for `measure`.
        held: what was measured.
        clips: dense pictures by number of prompt, float `[T, H, W, 3]` in [0, 1]. Default: they are made anew.
    """
    clips = {} if clips is None else clips
    cells = list(product(range(len(plan.prompts)), range(plan.ranges), range(held.change.shape[2])))
    todo = [] if held.probe is None else [cell for cell in cells if cell not in held.probed]
    for place, (number, at, part) in enumerate(todo):
        tell(f"probe {len(cells) - len(todo) + place + 1} of {len(cells)}")
        if number not in clips:
            clips[number] = _generate(pipe, plan, number, inputs, method="dense")
        made = _generate(pipe, plan, number, inputs, **_erring(plan, held, at, part))
        held = held.copy()
        held.change[number, at, part] = float(np.square(made - clips[number]).mean())
        held.probed.append((number, at, part))
        held.save(path, plan.plain_settings())
    return held


def _generate(pipe: Any, plan: Plan, number: int, inputs: dict[str, Any] | None, **what: Any) -> np.ndarray:
    with accelerate(pipe, **what):
        return call_pipeline(pipe, plan.generation, plan.prompts[number], plan.seed + number, inputs)[0]


def _erring(plan: Plan, held: Statistics, at: int, part: int) -> dict[str, Any]:
    """What makes one part of the layers run the probe's candidate in one range of steps."""
    count, steps = held.calls.shape[1], plan.generation.num_inference_steps
    layers = layer_parts(count, held.change.shape[2])[part]
    first, second = (
        schedule and only(schedule, steps, plan.steps_of(at), count, layers)
        for schedule in (plan.preset.schedule, plan.preset.schedule_2)
    )
    method = list(plan.candidates.values())[held.probe or 0]
    return {"method": method, "schedule": first, "schedule_2": second}


def only(schedule: Schedule, steps: int, kept: Iterable[int], layers: int, part: slice) -> Schedule:
    """The schedule with all steps but `kept` and all layers but `part` dense, besides those that are so in it."""
    own = {step for start, end in schedule.dense_steps for step in range(start, end)}
    fixed = {layer for start, end in schedule.dense_layers for layer in range(start, end)}
    dense_steps = sorted({*range(steps)} - set(kept) | own)
    dense_layers = sorted({*range(layers)} - {*range(layers)[part]} | fixed)
    ruled = {"overrides": (), "layer_groups": (), "head_groups": None, "head_table": None, "max_error": None}
    return schedule.model_copy(
        update={**ruled, "dense_steps": _ranges(dense_steps), "dense_layers": _ranges(dense_layers)}
    )


def _ranges(numbers: list[int]) -> tuple[tuple[int, int], ...]:
    """Ascending numbers as half-open ranges."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] == number:
            found[-1] = (found[-1][0], number + 1)
        else:
            found.append((number, number + 1))
    return tuple(found)
