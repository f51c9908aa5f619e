"""What each candidate does by itself, in a real run: how long its attention takes, and how the picture changes.

A run pays for orders and choices when the engine makes them, and keeps and shares them as the engine does, and guidance
multiplies in it what differs between its branches. So both figures are taken from the run, not from single calls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_accel.acceleration import accelerate
from dit_accel.calibrate.statistics import Statistics
from dit_accel.generation import call_pipeline
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.report.records import CallRecord
from dit_accel.schedule import ALL_DENSE, Schedule

if TYPE_CHECKING:
    from dit_accel.calibrate.run import Plan

DENSE = -1
"""The run under dense attention, the fastest there is, which times are shares of."""


@dataclass(frozen=True)
class Run:
    """One generation: a candidate by number (or `DENSE`) in all heads, or, `mixed`, in every second, the others dense.

    Two groups of heads in a layer take longer than either in the whole layer lets expect; `mixed` says by how much.
    """

    prompt: int
    candidate: int
    mixed: bool = False


def runs_of(plan: Plan, kinds: tuple[int, ...]) -> list[Run]:
    """All runs: of every prompt dense, each candidate, and, where kinds can be mixed, the first of each among dense."""
    methods, heads = list(plan.candidates.values()), [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    mixed = [index for index in heads if methods[index].name != "dense"] if len(heads) > 1 else []
    alone = [index for index, method in enumerate(methods) if method.name != "dense"]
    found = []
    for prompt in range(len(plan.prompts)):
        found += [Run(prompt, index) for index in (DENSE, *alone)]
        found += [Run(prompt, index, mixed=True) for index in mixed]
    return found


def run_alone(
    pipe: Any,
    plan: Plan,
    held: Statistics,
    path: Path,
    tell: Callable[[str], None],
    inputs: dict[str, Any] | None = None,
) -> Statistics:
    """Make the runs that `held` lacks, and write it to `path` after each prompt.

    Args:
        pipe, plan, path, tell, inputs: as for `measure`.
        held: what was measured.
    """
    wanted = runs_of(plan, held.kinds)
    for prompt in range(len(plan.prompts)):
        todo = [run for run in wanted if run.prompt == prompt]
        if prompt in held.alone:
            continue
        held, reference = held.copy(), np.zeros(0)
        for number, run in enumerate(todo):
            tell(f"candidates alone, prompt {prompt + 1} of {len(plan.prompts)}, run {number + 1} of {len(todo)}")
            clip, taken = _generate(pipe, plan, held, run, inputs)
            reference = clip if run.candidate == DENSE else reference
            _note(held, run, taken, float(np.square(clip - reference).mean()))
        held.alone.append(prompt)
        held.save(path, plan.plain_settings())
    return held


def _note(held: Statistics, run: Run, taken: tuple[float, float], change: float) -> None:
    """Keep what a run took, as a share of dense attention's, and how its picture differs."""
    at, index = run.prompt, run.candidate
    if index == DENSE:
        held.dense_time[at] = taken[0]
        held.time[at, 0] = 1.0  # of a candidate that is dense
        return
    whole, order = (each / float(held.dense_time[at]) for each in taken)
    if run.mixed:
        held.time[at, 2, index] = whole + order
    else:
        held.time[at, 0, index], held.time[at, 1, index], held.alone_change[at, index] = whole, order, change


def _generate(
    pipe: Any, plan: Plan, held: Statistics, run: Run, inputs: dict[str, Any] | None
) -> tuple[np.ndarray, tuple[float, float]]:
    """The picture, and the time of attention without ordering, and of ordering."""
    is_dense = run.candidate == DENSE
    method = get_method("composed") if is_dense else list(plan.candidates.values())[run.candidate]
    own = (plan.preset.schedule, plan.preset.schedule_2)
    first, second = (s and (ALL_DENSE if is_dense else _ruled(s, run, method, held)) for s in own)
    # Hoisted or not, ordering is told apart.
    with accelerate(pipe, method=method, schedule=first, schedule_2=second, hoist=False) as acceleration:
        prompt, seed = plan.prompts[run.prompt], plan.seed + run.prompt
        clip, times = call_pipeline(pipe, plan.generation, prompt, seed, inputs)
        calls = acceleration.report().calls
    return clip, times_beside_the_rest(calls, times["steps"], measured_calls(plan, held))


def _ruled(schedule: Schedule, run: Run, method: Method, held: Statistics) -> Schedule:
    """The schedule without other rules about layers and heads."""
    ruled: dict[str, Any] = {"overrides": (), "layer_groups": (), "head_groups": None, "max_error": None}
    layers, heads = held.error.shape[1:3]
    row = [("own", "dense")[head % 2] for head in range(heads)]
    modes = {"own": {"method": method.name, "parameters": method.model_dump(mode="json", exclude_unset=True)}}
    table = {"modes": {**modes, "dense": {"method": "dense"}}, "heads": [row] * layers}
    return Schedule.make(
        **{**schedule.model_dump(exclude_unset=True), **ruled, "head_table": table if run.mixed else None}
    )


def measured_calls(plan: Plan, held: Statistics) -> set[tuple[int, int]]:
    """Step and layer of the calls that candidates take part in."""
    return {
        (step, layer)
        for at in range(plan.ranges)
        for step in plan.steps_of(at)
        for layer in (held.calls[at] > 0).nonzero().flatten().tolist()
    }


def times_beside_the_rest(
    calls: list[CallRecord], steps: list[float], measured: set[tuple[int, int]]
) -> tuple[float, float]:
    """Time of attention in the calls `measured`, without ordering, and of ordering, per time of all else in their step.

    The rest of a step is the same work in every run, so that a machine that is slower for a while spoils nothing.

    Args:
        calls: of one run.
        steps: seconds of each of its steps, by the wall clock, as the times of calls are.
        measured: step and layer.
    """
    spent = torch.zeros(len(steps), 3, dtype=torch.float64)  # all attention; that measured: rest, order
    for call in calls:
        order, rest = call.milliseconds("order"), call.milliseconds("select") + call.milliseconds("attend")
        spent[call.step, 0] += order + rest
        if (call.step, call.layer) in measured:
            spent[call.step, 1:] += torch.tensor([rest, order], dtype=torch.float64)
    used = sorted({step for step, _ in measured})
    others = (1e3 * torch.tensor(steps, dtype=torch.float64) - spent[:, 0])[used]
    whole, order = (spent[used, 1:] / others[:, None].clamp(min=1e-6)).mean(0).tolist()
    return whole, order
