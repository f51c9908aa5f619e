"""What `accelerate()` was asked for: preset, method, schedules and keyword arguments merged; what stands later wins."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.layer_methods import check_policy
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.presets import Preset
from dit_accel.schedule import Schedule


def resolve_policy(
    preset: Preset | None,
    method: str | Method | None,
    schedule: Schedule | Mapping[str, Any] | None,
    parameters: dict[str, Any],
) -> tuple[Method, Schedule]:
    """Merge preset, method, schedule and keyword arguments; what stands later wins.

    Args:
        preset: gives what the others leave open.
        method: name or `Method`; in place of the preset's.
        schedule: in place of the preset's.
        parameters: parameters of the method and fields of the schedule; the latter are taken out of it.

    Raises:
        ConfigError: unknown method or parameter, wrong type, value out of range.
    """
    timing = {key: parameters.pop(key) for key in list(parameters) if key in Schedule.model_fields}
    base = {} if preset is None else preset.schedule.model_dump(exclude_unset=True)
    if isinstance(schedule, Schedule):
        base = schedule.model_dump(exclude_unset=True)
    elif schedule is not None:
        base = dict(schedule)
    timetable = Schedule.make(**{**base, **timing})
    if isinstance(method, Method):
        if parameters:
            method = get_method(method.name, **{**method.model_dump(exclude_unset=True), **parameters})
        check_policy(method, timetable)
        return method, timetable
    chosen: dict[str, Any] = {}
    if preset is not None and method in (None, preset.method.name):
        method, chosen = preset.method.name, dict(preset.method.parameters)
    policy = get_method(str(method or "dense"), **{**chosen, **parameters})
    check_policy(policy, timetable)
    return policy, timetable


def second_schedule(
    preset: Preset | None,
    schedule: Schedule | Mapping[str, Any] | None,
    schedule_2: Schedule | Mapping[str, Any] | None,
    timing: dict[str, Any],
    components: Container[str],
    method: Method,
) -> Schedule | None:
    """The schedule of `transformer_2` where it differs; a `schedule` given in the call replaces both of a preset.

    Args:
        preset, schedule, schedule_2: as `accelerate` got them.
        timing: fields of schedules among its keyword arguments.
        components: names of the pipeline's transformers.
        method: what runs in both.

    Raises:
        ConfigError: a second schedule for a pipeline with one transformer, or a wrong value in it.
    """
    if schedule_2 is None and schedule is None and preset is not None:
        schedule_2 = preset.schedule_2
    if schedule_2 is None:
        return None
    if "transformer_2" not in components:
        raise ConfigError("schedule_2", "is for the second of two experts, and this pipeline has no transformer_2")
    fields = schedule_2.model_dump(exclude_unset=True) if isinstance(schedule_2, Schedule) else dict(schedule_2)
    second = Schedule.make("schedule_2", **{**fields, **timing})
    check_policy(method, second)
    return second
