"""The preset that a calibration ends in."""

from __future__ import annotations

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
from dit_accel.presets import MethodSpec
from dit_accel.schedule import Schedule


def head_table(assignment: Assignment, candidates: dict[str, Method]) -> HeadTable:
    """The assignment as a table; its palette holds the candidates that were chosen."""
    names = list(candidates)
    used = sorted({int(index) for index in assignment.choice.flatten()})
    modes = {
        f"m{index}": {"method": candidates[names[index]].name, "parameters": _plain(candidates[names[index]])}
        for index in used
    }
    return HeadTable.make({"modes": modes, "heads": [[f"m{i}" for i in row] for row in assignment.choice.tolist()]})


def prediction(assignment: Assignment) -> str:
    """What the solution promises, in one clause."""
    told = f"predicted error {assignment.error:.4f} at density {assignment.cost:.3f}"
    return told if assignment.time is None else f"{told}, attention in {assignment.time:.2f} of the time of dense"


def write_preset(path: Path, plan: Plan, assignment: Assignment, held: Statistics) -> None:
    """Write the preset calibrated for, with the head table in place of its method; it stands on its own.

    Args:
        path: file to write, `.yaml`; its stem is the preset's name.
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
    _write(path, plan, changes, ruled)


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
    _write(path, plan, changes, {"layer_groups": found.groups, "head_table": None})


def _source(plan: Plan, held: Statistics) -> str:
    made = plan.generation
    return (
        f"dit-accel calibrate, {time.strftime('%Y-%m-%d')}: {len(held.done)} prompts at {made.height} x {made.width} x "
        f"{made.num_frames}, {made.num_inference_steps} steps"
    )


def _write(path: Path, plan: Plan, changes: dict[str, Any], ruled: dict[str, Any]) -> None:
    """The preset with `changes`, and with `ruled` in both of its schedules; complete or not at all."""

    def under_rules(schedule: Schedule | None) -> Schedule | None:
        return None if schedule is None else schedule.model_copy(update=ruled)

    preset = plan.preset
    schedules = {"schedule": under_rules(preset.schedule), "schedule_2": under_rules(preset.schedule_2)}
    changes = {**changes, "name": path.stem, "generation": plan.generation, **schedules}
    data = preset.model_copy(update=changes).model_dump(mode="json", exclude_defaults=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    text = yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=10**6)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _plain(method: Method) -> dict[str, Any]:
    return method.model_dump(mode="json", exclude_unset=True)
