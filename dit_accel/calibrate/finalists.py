"""Solutions of one budget, tried on the prompts of the calibration: that whose pictures are closest to dense is taken.

A prediction adds up errors of single calls. What they do to a picture together only a picture can say.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

from dit_accel.calibrate.assign import Budget, Palette, assign
from dit_accel.calibrate.run import Plan
from dit_accel.calibrate.solve import Assignment
from dit_accel.calibrate.statistics import Statistics
from dit_accel.calibrate.write import calibrated_preset
from dit_accel.compare.candidates import Candidate, references
from dit_accel.compare.resume import resumed
from dit_accel.compare.runner import Task
from dit_accel.errors import ConfigError
from dit_accel.resolve import resolve_policy


def finalists(held: Statistics, plan: Plan, budget: Budget, among: Sequence[Palette] = ()) -> dict[str, Assignment]:
    """Different solutions of a budget, by name.

    That whose errors all count alike; that whose errors count for what probes saw them do, where there are any; and the
    best that has one candidate for all heads. A budget of error has one solution, the cheapest.

    Args:
        held: what was measured.
        plan: says the ranges of steps.
        budget: of error, density or time.
        among: palettes; see `assign`.

    Raises:
        ConfigError: see `assign`.
    """
    found = {"by error": assign(held, **budget, among=among, starts=plan.starts, weighted=False)}
    if budget.get("max_error") is not None:
        return found
    if held.probed:
        found["by effect"] = assign(held, **budget, among=among, starts=plan.starts)
    alone = []
    for index in range(len(plan.candidates)):
        try:
            alone.append(assign(held, **budget, among=[only(index, among)], starts=plan.starts))
        except ConfigError:  # it does not keep the budget
            continue
    if alone:
        found["uniform"] = min(alone, key=lambda each: each.error if each.change is None else each.change)
    unlike: dict[str, Assignment] = {}
    for name, assignment in found.items():
        if not any(assignment.choice.equal(other.choice) for other in unlike.values()):
            unlike[name] = assignment
    return unlike


def only(index: int, among: Sequence[Palette]) -> Palette:
    """The palette of one candidate, in an order that all layers share if some palette has it so."""
    return Palette((index,), any(index in palette.members and palette.hoisted for palette in among))


def try_out(
    pipe: Any,
    plan: Plan,
    tried: dict[str, Assignment],
    held: Statistics,
    path: Path,
    tell: Callable[[str], None],
    inputs: dict[str, Any] | None = None,
) -> dict[str, float]:
    """Generate the prompts of the calibration with each solution; mean PSNR in dB from the dense pictures, by name.

    Args:
        pipe, plan, tell, inputs: as for `measure`.
        tried: solutions by name.
        held: the statistics they rest on.
        path: file of the rows, `.jsonl`, from which a killed run goes on.
    """
    dense, _ = references(plan.preset)
    candidates = [dense]
    for name, assignment in tried.items():
        preset = calibrated_preset(name, plan, assignment, held)
        method, schedule = resolve_policy(preset, None, None, {})
        candidates.append(Candidate(name, method, schedule, preset=preset))
    tasks = [Task(prompt, plan.seed + number) for number, prompt in enumerate(plan.prompts)]
    second = plan.preset.schedule_2
    key = " ".join([plan.weights, *([] if second is None else [second.model_dump_json()]), *plan.inputs.values()])
    made = resumed(pipe, plan.generation, tasks, candidates, path, key, tell, inputs=inputs)
    rows = [row for each in made for row in each]
    near = {name: mean(row["psnr"] for row in rows if row["candidate"] == name) for name in tried}
    for name, psnr in near.items():
        ratio = median(row["ratio"] for row in rows if row["candidate"] == name)
        tell(f"{name}: {psnr:.2f} dB from dense on the prompts of the calibration, {ratio:.2f}x its speed")
    return near


def best_of(tried: dict[str, Assignment], near: dict[str, float]) -> Assignment:
    """The solution that is closest to dense, by the figures of `try_out`; a single one without any."""
    return tried[max(tried, key=lambda name: near[name])] if len(tried) > 1 else next(iter(tried.values()))
