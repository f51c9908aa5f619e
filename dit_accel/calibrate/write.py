"""The preset that a calibration ends in."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import yaml

from dit_accel.calibrate.layers import LayerGroups
from dit_accel.calibrate.run import Plan
from dit_accel.calibrate.solve import Assignment
from dit_accel.calibrate.statistics import Statistics
from dit_accel.head_table import HeadTable
from dit_accel.methods.base import Method
from dit_accel.presets import MethodSpec, Preset
from dit_accel.schedule import Schedule


def head_table(assignment: Assignment, candidates: dict[str, Method]) -> HeadTable:
    """The assignment as a table; its palette holds the candidates that were chosen."""
    names = list(candidates)
    used = sorted({int(index) for index in assignment.choice.flatten()})
    modes = {
        f"m{index}": {"method": candidates[names[index]].name, "parameters": _plain(candidates[names[index]])}
        for index in used
    }
    first, *others = ([[f"m{i}" for i in row] for row in rows] for rows in assignment.choice.tolist())
    later, before = [], first
    for step, rows in zip(assignment.starts, others, strict=True):
        if rows != before:
            later.append({"step": step, "heads": rows})
        before = rows
    return HeadTable.make({"modes": modes, "heads": first, "later": later})


def prediction(assignment: Assignment) -> str:
    """What the solution promises, in one clause."""
    told = f"predicted error {assignment.error:.4f} at density {assignment.cost:.3f}"
    told += "" if assignment.time is None else f", attention in {assignment.time:.2f} of the time of dense"
    if assignment.change is None:
        return told
    near = 10 * math.log10(1 / max(assignment.change, 1e-10))
    return f"{told}, {near:.1f} dB from the dense picture"


def calibrated_preset(name: str, plan: Plan, assignment: Assignment, held: Statistics) -> Preset:
    """The preset calibrated for, with the head table in place of its method.

    Args:
        name: its name.
        plan: what was measured.
        assignment: the solution.
        held: the statistics it rests on.
    """
    table, preset = head_table(assignment, plan.candidates), plan.preset
    most = table.modes[next(iter(table.shares()))]
    # A table says what every head does, which leaves no room for other rules about layers and heads.
    ruled = {"overrides": (), "layer_groups": (), "head_groups": None, "head_table": table}
    changes = {
        "description": f"{preset.description}, calibrated per head",
        "method": MethodSpec(name=str(most.method), parameters=dict(most.parameters)),
        "source": f"{_source(plan, held)}; {prediction(assignment)}",
    }
    return _changed(name, plan, changes, ruled)


def write_preset(path: Path, plan: Plan, assignment: Assignment, held: Statistics) -> None:
    """Write the preset of `calibrated_preset` to a `.yaml` file, whose stem is its name; it stands on its own."""
    _write(path, calibrated_preset(path.stem, plan, assignment, held))


def write_layer_preset(path: Path, plan: Plan, found: LayerGroups, held: Statistics) -> None:
    """Write the preset calibrated for, with the one candidate as its method and groups of layers that share a plan.

    Args:
        path: file to write, `.yaml`; its stem is the preset's name.
        plan: what was measured.
        found: the groups.
        held: the statistics they rest on.
    """
    (method,) = plan.candidates.values()
    changes = {
        "description": f"{plan.preset.description}, plans shared by groups of layers",
        "method": MethodSpec(name=method.name, parameters=_plain(method)),
        "source": f"{_source(plan, held)}; predicted error {found.error:.4f} with {found.plans} plans per step for "
        f"{found.layers} layers",
    }
    _write(path, _changed(path.stem, plan, changes, {"layer_groups": found.groups, "head_table": None}))


def _source(plan: Plan, held: Statistics) -> str:
    made = plan.generation
    return (
        f"dit-accel calibrate, {time.strftime('%Y-%m-%d')}: {len(held.done)} prompts at {made.height} x {made.width} x "
        f"{made.num_frames}, {made.num_inference_steps} steps"
    )


def _changed(name: str, plan: Plan, changes: dict[str, Any], ruled: dict[str, Any]) -> Preset:
    """The preset calibrated for, with `changes`, and with `ruled` in both of its schedules."""

    def under_rules(schedule: Schedule | None) -> Schedule | None:
        return None if schedule is None else schedule.model_copy(update=ruled)

    schedules = {"schedule": under_rules(plan.preset.schedule), "schedule_2": under_rules(plan.preset.schedule_2)}
    return plan.preset.model_copy(update={**changes, "name": name, "generation": plan.generation, **schedules})


def _write(path: Path, preset: Preset) -> None:
    """The preset as a file, complete or not at all."""
    data = preset.model_dump(mode="json", exclude_defaults=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=10**6)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(method: Method) -> dict[str, Any]:
    return method.model_dump(mode="json", exclude_unset=True)
