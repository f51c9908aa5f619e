"""Lay options of the command line over a preset, and refuse those that its pipeline has no use for."""

from __future__ import annotations

from math import ceil
from typing import Any

from pydantic import ValidationError

from dit_accel.error_estimate import rows_to_check
from dit_accel.errors import ConfigError
from dit_accel.estimate import token_layout
from dit_accel.methods.registry import config_error
from dit_accel.models import TINY, call_parameters, fit_to_model, stock_pipeline
from dit_accel.presets import Generation, MethodSpec, Preset, load_preset
from dit_accel.presets.schema import check_size, check_task
from dit_accel.resolve import resolve_policy, second_schedule

_BY_GUIDER = "guidance_scale"


_TIMING = ("dense_steps", "max_error")  # fields of schedules, of both where a preset has two
METHOD_OPTIONS = ("method", "density", *_TIMING)


def resolve(preset: str, options: dict[str, Any], model: str | None) -> Preset:
    """The preset called `preset` with everything that the command line lays over it.

    Args:
        preset: name or YAML file.
        options: fields of `Generation`, and `METHOD_OPTIONS`; None where left out.
        model: the option `--model`.

    Raises:
        ConfigError: see `override_generation` and `override_method`; `max_error` where nothing can be checked.
    """
    method = options.get("method")
    if method is not None and not isinstance(method, str):
        raise ConfigError("method", f"expected the name of a method, got {method!r}")
    generation = {name: value for name, value in options.items() if name not in METHOD_OPTIONS}
    chosen = override_generation(load_preset(preset), generation, model)
    changes = {name: options.get(name) for name in METHOD_OPTIONS if name != "method"}
    resolved = override_method(chosen, method, changes)
    if options.get("max_error") is not None:
        _check_guard(resolved, model)
    return resolved


def _check_guard(preset: Preset, model: str | None) -> None:
    """A guard that is asked for must have something to check; a model that is not the preset's has its own geometry."""
    if preset.method.name == "dense" and preset.schedule.head_table is None:
        raise ConfigError(
            "--max-error", f"preset {preset.name} runs dense, which has no error; choose another --method"
        )
    tokens = token_layout(preset.model, preset.generation).tokens
    if model is None and rows_to_check(tokens) == 0:
        raise ConfigError(
            "--max-error",
            f"{tokens} tokens are too few to check under 1 % of the rows, so every call would run dense; expected "
            "about 4,000: leave it out, or make the result larger or longer",
        )


def frames_of(seconds: float, frames: int | None, preset: Preset, fps: int | None) -> int:
    """Frames of at least that many seconds, of a number that the preset's autoencoder can make.

    Args:
        seconds: the option `--seconds`.
        frames: the option `--num-frames`.
        preset: says the frames per second and the autoencoder.
        fps: the option `--fps`.

    Raises:
        ConfigError: no time, both options, or a preset that makes images.
    """
    check_seconds(seconds, frames)
    if preset.makes_image:
        raise ConfigError("--seconds", f"preset {preset.name} makes an image")
    step = preset.model.vae_temporal
    return 1 + step * max(1, ceil((seconds * (fps or preset.generation.fps) - 1) / step))


def check_seconds(seconds: float | None, frames: int | None) -> None:
    """Refuse a length that is none, or is said twice; None where an option was left out.

    Raises:
        ConfigError: no time, or both options.
    """
    if seconds is None:
        return
    if frames is not None:
        raise ConfigError("--seconds", "says the same as --num-frames; leave one of them out")
    if not 0 < seconds < float("inf"):
        raise ConfigError("--seconds", f"expected more than 0, got {seconds:g}")


def override_generation(preset: Preset, values: dict[str, Any], model: str | None) -> Preset:
    """The preset with the command line's generation values, checked as its own.

    Args:
        preset: to lay them over.
        values: by name of `Generation`; None where an option was left out.
        model: the option `--model`; the tiny model has a size of its own, and none of the real model's limits.

    Raises:
        ConfigError: a wrong value, a size that the model cannot make, or an option that its pipeline does not take.
    """
    given = {name: value for name, value in values.items() if value is not None}
    preset = fit_to_model(preset, model)
    try:
        generation = Generation(**{**preset.generation.model_dump(), **given})
    except ValidationError as error:
        raise config_error(error, "generation", list(Generation.model_fields)) from None
    _check_taken(preset, given)
    check_task(preset.task, preset.model.boundary, generation, preset.schedule_2 is not None)
    if model != TINY:
        check_size(preset.model, generation)
    return preset.model_copy(update={"generation": generation})


def override_method(preset: Preset, method: str | None, changes: dict[str, Any]) -> Preset:
    """The preset with another method, other parameters (`density`) or other timing; None where left out."""
    given = {name: value for name, value in changes.items() if value is not None}
    policy, schedule = resolve_policy(preset, method, None, dict(given))
    chosen = MethodSpec(name=policy.name, parameters=policy.model_dump(mode="json", exclude_unset=True))
    update: dict[str, Any] = {"method": chosen, "schedule": schedule}
    timing = {name: value for name, value in given.items() if name in _TIMING}
    update["schedule_2"] = second_schedule(preset, None, None, timing, ("transformer_2",), policy, method)
    return preset.model_copy(update=update)


def _check_taken(preset: Preset, given: dict[str, Any]) -> None:
    """Every value given must reach the pipeline."""
    names = [name for name in given if name != "fps"]
    if not names:
        return
    cls = stock_pipeline(preset.pipeline)
    known = call_parameters(cls)
    for name in names:
        if name not in known and not (name == _BY_GUIDER and has_guider(cls)) and name != "num_frames":
            raise ConfigError(f"--{name.replace('_', '-')}", f"{preset.pipeline} takes no {name}{_instead(name)}")
    scale = given.get("true_cfg_scale", preset.generation.true_cfg_scale) or 1.0
    if given.get("negative_prompt") and "true_cfg_scale" in known and scale <= 1:
        raise ConfigError("--negative-prompt", f"{preset.pipeline} uses it only with --true-cfg-scale above 1")


def _instead(name: str) -> str:
    return "; the size follows the image" if name in ("height", "width") else ""


def has_guider(pipeline_class: Any) -> bool:
    """Whether the pipeline holds its guidance in a guider, not in an argument of its call."""
    from inspect import signature

    return "guider" in signature(pipeline_class).parameters
