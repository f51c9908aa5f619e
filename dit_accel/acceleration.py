"""The one line: `accelerate(pipe, ...)` replaces attention processors and returns a handle that can undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.extras.cache import Guidance
from dit_accel.extras.install import install_extras
from dit_accel.families.base import Family
from dit_accel.families.hoisting import Hoist
from dit_accel.families.registry import family_of
from dit_accel.families.tracking import track
from dit_accel.flow_shift import scheduler_shift
from dit_accel.handle import Acceleration, Installed, Replaced, carry_settings, handle_of
from dit_accel.kernels.registry import Request, check_backend, why_none
from dit_accel.methods.base import Method
from dit_accel.presets import Preset, load_preset
from dit_accel.resolve import resolve_policy, second_schedule
from dit_accel.schedule import Schedule
from dit_accel.siblings import transformers_of


def accelerate(
    pipe: Any,
    preset: str | Path | Preset | None = None,
    *,
    method: str | Method | None = None,
    schedule: Schedule | Mapping[str, Any] | None = None,
    schedule_2: Schedule | Mapping[str, Any] | None = None,
    backend: str = "auto",
    break_even: float | None = None,
    seed: int = 0,
    hoist: bool = True,
    family: Family | None = None,
    offload_to: str | torch.device | None = None,
    **parameters: Any,
) -> Acceleration:
    """Accelerate a Diffusers pipeline (or a bare transformer) in place.

    A second call replaces the first; nothing stacks. Weights, schedulers, LoRA and the pipeline's own call stay as
    they are. Cross-attention is left alone.

    Args:
        pipe: a pipeline with a `transformer` (and `transformer_2` where the model has two), or the transformer.
        preset: name, path or `Preset` that gives method, parameters, schedule and extras. Default None: `method`
            gives them, and there are no extras.
        method: name of a method (see `list_methods`) or a `Method`. Overrides the preset's, and its head table.
            Default "dense" when there is no preset either.
        schedule: a `Schedule` or its fields as a mapping. Default: the preset's, else all calls run the method.
        schedule_2: the same for `transformer_2` (Wan 2.2: the low-noise expert), whose steps count on from those of
            the first. Default: the preset's, else as `schedule`.
        backend: backend of `block_attention`. Default "auto".
        break_even: density above which a call runs dense because dense is faster. Default None: as measured for the
            backend; 1.0 turns the rule off. On a GPU it is compared with the density asked for where blocks are chosen
            there; of a rule that names none, such as a share of the mass, nobody knows it in time.
        seed: seed of methods that draw random numbers. Default 0.
        hoist: where all heads and layers want the tokens in one order (tiles), put them into it once per forward pass
            instead of in every layer, in families that allow it. Blocks then see tokens in that order: turn it off for
            hooks of your own that take a block's tokens for a raster. Default True.
        family: how to read the transformer, for one that has no family of its own:
            `GenericFamily(grid=(frames, height, width), text="before")`. Default None: looked up by its class.
        offload_to: accelerator that the weights are brought to where the preset's extras offload them. Default None:
            the one that they lie on, or torch's current one.
        parameters: the method's parameters (`density=0.3`) and fields of both schedules (`dense_steps=10`).

    Returns:
        The handle.

    Raises:
        ConfigError: unknown preset, method, parameter or backend, wrong type, value out of range; by dotted path.
        UnsupportedError: no family knows the transformer, a processor is not Diffusers' own, an extra of the preset
            cannot work on this pipeline, or the GPU that holds it lacks the method's arithmetic.
    """
    check_backend(backend)
    resolved = load_preset(preset) if isinstance(preset, (str, Path)) else preset
    timing = {key: value for key, value in parameters.items() if key in Schedule.model_fields}
    policy, timetable = resolve_policy(resolved, method, schedule, parameters, schedule_2)
    models = _transformers(pipe)
    second = second_schedule(resolved, schedule, schedule_2, timing, models, policy, method) or timetable
    families = {name: (family or family_of(model)).for_model(model) for name, model in models.items()}
    _check_family(resolved, families)
    engines = {}
    for name, model in models.items():
        modules = [layer.module for layer in families[name].layers(model)]
        chosen = second if name == "transformer_2" else timetable
        engines[name] = Engine(policy, chosen, modules, name, backend, break_even, seed, hoist)
        _check_arithmetic(engines[name].methods.all(), model, backend)
    # Not before all that can be checked has been: where this call fails, what ran before goes on.
    for model in models.values():
        if (earlier := handle_of(model)) is not None:
            earlier.remove()
    for name, model in models.items():
        for layer in families[name].layers(model):
            families[name].check_processor(layer)
    settings: dict[str, Any] = {
        "preset": None if resolved is None else resolved.name,
        "method": policy.name,
        "parameters": policy.model_dump(mode="json"),
        "schedule": timetable.model_dump(mode="json", exclude_defaults=True),
        "schedule_2": None if second is timetable else second.model_dump(mode="json", exclude_defaults=True),
        "extras": {} if resolved is None else resolved.extras.model_dump(mode="json", exclude_defaults=True),
        "backend": backend,
    }
    notes = [f"{name}: {note}" for name, model in models.items() for note in families[name].notes(model)]
    if notes := notes + _notes_of_shift(resolved, pipe):
        settings["notes"] = notes
    undo_extras = _install_extras(resolved, pipe, models, offload_to)
    installed = {}
    try:
        for name, model in models.items():
            installed[name] = _install(model, families[name], engines[name])
    except BaseException:
        Acceleration(settings, installed, lambda: None).remove()
        undo_extras()
        raise
    first, *others = installed.values()
    for part in others:
        first.hook.siblings.join(part.hook)
        first.engine.siblings.join(part.engine)
    return Acceleration(settings, installed, undo_extras)


def _check_arithmetic(methods: Iterable[Method], model: nn.Module, backend: str) -> None:
    """Refuse what the GPU of the model cannot compute before the steps that run dense have been waited for.

    A model that is moved to a GPU later is refused there by its first call.
    """
    weight = next(model.parameters(), None)
    if weight is None or weight.device.type != "cuda":
        return
    for method in (method for method in methods if method.precision is not None):
        # Weights may be stored in fewer bits than they are used in; every head size has the same arithmetic.
        request = Request(weight.device, torch.bfloat16, 64, remainder=method.remainder, precision=method.precision)
        if (reason := why_none(backend, request)) is not None:
            raise UnsupportedError(f"method {method.name!r} asks for arithmetic that {weight.device} lacks: {reason}")


def _notes_of_shift(preset: Preset | None, pipe: Any) -> list[str]:
    """That the user's own pipeline, which stays as it is, runs at other noise levels than the preset was made for."""
    wanted, scheduler = None if preset is None else preset.model.flow_shift, getattr(pipe, "scheduler", None)
    runs = None if scheduler is None else scheduler_shift(scheduler)
    if wanted is None or runs in (None, wanted):
        return []
    remedy = f"`dit_accel.flow_shift.set_flow_shift(pipe, {wanted:g})` sets it"
    return [f"the scheduler's shift is {runs:g}, the preset's {wanted:g}: {remedy}"]


def _install_extras(
    preset: Preset | None, pipe: Any, models: dict[str, nn.Module], device: str | torch.device | None
) -> Callable[[], None]:
    if preset is None:
        return lambda: None
    values = preset.generation
    guidance = Guidance(values.num_inference_steps, values.guidance_scale, values.true_cfg_scale)
    return install_extras(preset.extras, pipe, models, guidance, device)


def _install(model: nn.Module, family: Family, engine: Engine) -> Installed:
    layers = family.layers(model)
    first_of_role = {layer.role: layer for layer in reversed(layers)}
    processors = {role: family.processor(layer, engine) for role, layer in first_of_role.items()}
    for role, layer in first_of_role.items():
        carry_settings(layer.module.processor, processors[role])
    replaced = tuple(Replaced(x.module, x.module.processor, processors[x.role]) for x in layers)
    order = Hoist(model, family, engine, [(layer.module, layer.ours) for layer in replaced])
    hook = track(model, family, engine.begin, order.begin)
    # Last, so that whatever fails before leaves the model as it was.
    for each in replaced:
        each.module.set_processor(each.ours)
    return Installed(model, engine, replaced, hook, order)


def _transformers(pipe: Any) -> dict[str, nn.Module]:
    if isinstance(pipe, nn.Module):
        return {"transformer": unwrap_module(pipe)}
    if models := transformers_of(pipe):
        return models
    raise UnsupportedError(f"{type(pipe).__name__}: expected a pipeline with a `transformer`, or a transformer")


def _check_family(preset: Preset | None, families: dict[str, Family]) -> None:
    for family in families.values():
        if preset is not None and preset.family != family.name:
            raise ConfigError(
                f"preset {preset.name}", f"is for family {preset.family!r}, but the pipeline is of {family.name!r}"
            )
