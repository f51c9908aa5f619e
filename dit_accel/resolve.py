"""What `accelerate()` was asked for: preset, method, schedules and keyword arguments merged; what stands later wins."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.layer_methods import check_policy
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method, merged_parameters, with_parameters
from dit_accel.presets import Preset
from dit_accel.schedule import Schedule

Asked = Schedule | Mapping[str, Any] | None


def resolve_policy(
    preset: Preset | None,
    method: str | Method | None,
    schedule: Asked,
    parameters: dict[str, Any],
    schedule_2: Asked = None,
) -> tuple[Method, Schedule]:
    """Merge preset, method, schedule and keyword arguments; what stands later wins.

    Args:
        preset: gives what the others leave open.
        method: name or `Method`; in place of the preset's, and of its head table.
        schedule: in place of the preset's.
        parameters: parameters of the method and fields of the schedule; the latter are taken out of it.
        schedule_2: what the call gives for the second expert, which may heed parameters that the first does not.

    Raises:
        ConfigError: unknown method or parameter, wrong type, value out of range, or a parameter that the preset's head
            table decides for every head.
    """
    timing = {key: parameters.pop(key) for key in list(parameters) if key in Schedule.model_fields}
    base = _fields(schedule)
    if schedule is None and preset is not None:
        base = _under_method(preset.schedule, preset, method)
    timetable = Schedule.make(**{**base, **timing})
    if isinstance(method, Method):
        policy = with_parameters(method, parameters) if parameters else method
    else:
        name, chosen = method or "dense", {}
        if preset is not None and method in (None, preset.method.name):
            name, chosen = preset.method.name, preset.method.parameters
        policy = get_method(name, **merged_parameters(chosen, parameters))
    if preset is not None and method is None and schedule is None and "head_table" not in timing:
        _check_heeded(preset, schedule_2, parameters)
    check_policy(policy, timetable)
    return policy, timetable


def second_schedule(
    preset: Preset | None,
    schedule: Asked,
    schedule_2: Asked,
    timing: dict[str, Any],
    components: Container[str],
    method: Method,
    asked: str | Method | None = None,
) -> Schedule | None:
    """The schedule of `transformer_2` where it differs; a `schedule` given in the call replaces both of a preset.

    Args:
        preset, schedule, schedule_2: as `accelerate` got them.
        timing: fields of schedules among its keyword arguments.
        components: names of the pipeline's transformers.
        method: what runs in both.
        asked: the method that `accelerate` got. Default None: it got none.

    Raises:
        ConfigError: a second schedule for a pipeline with one transformer, or a wrong value in it.
    """
    if schedule_2 is None and schedule is None and preset is not None and preset.schedule_2 is not None:
        schedule_2 = _under_method(preset.schedule_2, preset, asked)
    if schedule_2 is None:
        return None
    if "transformer_2" not in components:
        raise ConfigError("schedule_2", "is for the second of two experts, and this pipeline has no transformer_2")
    second = Schedule.make("schedule_2", **{**_fields(schedule_2), **timing})
    check_policy(method, second)
    return second


def _fields(schedule: Asked) -> dict[str, Any]:
    """What a schedule sets."""
    if isinstance(schedule, Schedule):
        return schedule.model_dump(exclude_unset=True)
    return dict(schedule or {})


def _under_method(schedule: Schedule, preset: Preset, asked: str | Method | None) -> dict[str, Any]:
    """What a preset's schedule sets under a method named in the call, which runs in place of the head table.

    The overrides are for parameters of the preset's method, and go where another takes its place.
    """
    fields = _fields(schedule)
    if asked is not None:
        fields.pop("head_table", None)
        if preset.method.name != (asked.name if isinstance(asked, Method) else asked):
            fields.pop("overrides", None)
    return fields


def _check_heeded(preset: Preset, schedule_2: Asked, parameters: Mapping[str, Any]) -> None:
    """Refuse a parameter that no head would run under, since the head tables decide it for all.

    Raises:
        ConfigError: there is one.
    """
    second = preset.schedule_2 if schedule_2 is None else Schedule.make("schedule_2", **_fields(schedule_2))
    schedules = [each for each in (preset.schedule, second) if each is not None]
    for name in parameters:
        if all(_decides(each, name) for each in schedules):
            raise ConfigError(
                name,
                f"the head table of preset {preset.name} decides it for every head; name a method as well, which "
                "runs in place of the table",
            )


def _decides(schedule: Schedule, name: str) -> bool:
    """Whether a schedule's head table leaves no head to a parameter of the method."""
    table = schedule.head_table
    used = [] if table is None else [table.modes[mode] for mode in table.shares()]
    return bool(used) and all(mode.method is not None or name in mode.parameters for mode in used)
