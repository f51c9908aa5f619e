"""Switch a preset's extras on, and off again as far as that can be undone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from dit_accel.errors import UnsupportedError
from dit_accel.extras.cache import Guidance, enable_cache
from dit_accel.extras.settings import Compile, Extras, LayerwiseCasting, Offload
from dit_accel.siblings import transformers_of


def install_extras(
    extras: Extras,
    pipe: Any,
    models: dict[str, nn.Module],
    guidance: Guidance,
    device: str | torch.device | None = None,
) -> Callable[[], None]:
    """Switch `extras` on; returns what undoes it.

    Step cache and compilation are undone. Casting and offload stay: they say how and where weights are stored.
    Must run before the transformers' forward passes are tracked, so that a cache that changes the batch stands inside.

    Args:
        extras: what to switch on.
        pipe: the pipeline, or the bare transformer.
        models: its transformers by component name.
        guidance: how the generation will run.
        device: see `offload_device`.

    Raises:
        UnsupportedError: what cannot work on this pipeline or machine, by name and with the reason.
    """
    _check_fit(extras, pipe, models, device)
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    try:
        _switch_on(extras, pipe, models, guidance, undo, device)
    except BaseException:
        undo_all()
        raise
    return undo_all


def store_weights(extras: Extras, pipe: Any, device: str | torch.device | None = None) -> None:
    """Switch on what says how and where weights are stored, for runs that have no step cache and are not compiled.

    Args:
        extras: of the preset that the pipeline was loaded for; see `load_for_preset`.
        pipe: the pipeline.
        device: see `offload_device`.

    Raises:
        UnsupportedError: see `install_extras`.
    """
    models = transformers_of(pipe)
    _check_fit(extras, pipe, models, device)
    if extras.layerwise_casting is not None:
        _cast(extras.layerwise_casting, models)
    if extras.offload is not None:
        _offload(extras.offload, pipe, models, device)


def offload_device(
    spec: Offload, device: str | torch.device | None = None, models: Mapping[str, nn.Module] | None = None
) -> torch.device:
    """The accelerator, by its number, that offloaded weights are brought to when they are needed.

    Args:
        spec: what a preset asks for.
        device: the accelerator that was asked for; one without a number is torch's current one. Default None, as
            "auto": the one that the weights lie on, or torch's current one.
        models: what will be offloaded. Default: not known yet.

    Raises:
        UnsupportedError: the CPU was asked for, there is no accelerator, or it has no streams and `spec` wants them.
    """
    current = _accelerator()
    if current.type == "cpu":
        raise UnsupportedError(
            f"extras.offload: mode {spec.mode} moves weights between an accelerator and main memory, and torch "
            "finds no accelerator here"
        )
    chosen = _home(models or {}) or current if device in (None, "auto") else torch.device(str(device))
    if chosen.type == "cpu":
        raise UnsupportedError(
            f"extras.offload: mode {spec.mode} computes on an accelerator, and the device asked for is cpu; ask for "
            f"{current}, or set offload to null in a preset that extends this one"
        )
    if spec.stream and chosen.type not in ("cuda", "xpu"):
        raise UnsupportedError(f"extras.offload: stream is for CUDA and XPU devices, and the accelerator is {chosen}")
    return current if chosen == torch.device(current.type) else chosen


def _home(models: Mapping[str, nn.Module]) -> torch.device | None:
    """The accelerator that weights lie on; None where they are in main memory."""
    weights = (weight for model in models.values() for weight in model.parameters())
    return next((weight.device for weight in weights if weight.device.type not in ("cpu", "meta")), None)


def _switch_on(
    extras: Extras,
    pipe: Any,
    models: dict[str, nn.Module],
    guidance: Guidance,
    undo: list[Callable[[], None]],
    device: str | torch.device | None,
) -> None:
    """Every extra in the one order that works; what undoes those that are on goes to `undo`."""
    if extras.layerwise_casting is not None:
        _cast(extras.layerwise_casting, models)
    if extras.cache is not None:
        undo.append(enable_cache(extras.cache, pipe, models, guidance))
    if extras.offload is not None:
        _offload(extras.offload, pipe, models, device)
    if extras.compile is not None:
        undo.append(_compile(extras.compile, models))


def _check_fit(extras: Extras, pipe: Any, models: dict[str, nn.Module], device: str | torch.device | None) -> None:
    offload = extras.offload
    if offload is not None:
        offload_device(offload, device, models)
    if offload is not None and offload.mode != "group" and isinstance(pipe, nn.Module):
        raise UnsupportedError(f"extras.offload: mode {offload.mode} needs a pipeline, and this is a bare transformer")
    for name, model in models.items():
        is_quantized = getattr(model, "hf_quantizer", None) is not None
        if extras.quantization is not None and not is_quantized and name in extras.quantization.components:
            raise UnsupportedError(
                f"extras.quantization: {name} is loaded already, and weights are quantised while loading; load the "
                "pipeline with from_preset(), or with Diffusers' PipelineQuantizationConfig"
            )
        if extras.layerwise_casting is not None and is_quantized:
            raise UnsupportedError(f"extras.layerwise_casting: {name} is quantised, and its weights cannot be cast")


def _accelerator() -> torch.device:
    """Torch's current accelerator, by its number; the CPU where there is none."""
    if torch.accelerator.is_available():
        return torch.device(f"{torch.accelerator.current_accelerator()}:{torch.accelerator.current_device_index()}")
    from diffusers.utils.torch_utils import get_device

    return torch.device(get_device())  # it knows one that is none of torch's own


def _cast(spec: LayerwiseCasting, models: dict[str, nn.Module]) -> None:
    for model in models.values():
        transformer: Any = model
        if not _has_hook(model, "layerwise_casting"):
            transformer.enable_layerwise_casting(getattr(torch, spec.storage), compute_dtype=transformer.dtype)


def _offload(spec: Offload, pipe: Any, models: dict[str, nn.Module], asked: str | torch.device | None) -> None:
    device = offload_device(spec, asked, models)
    if spec.mode == "group":
        if any(_has_hook(model, "group_offloading") for model in models.values()):
            return
        target: Any = pipe if not isinstance(pipe, nn.Module) else next(iter(models.values()))
        target.enable_group_offload(
            onload_device=device,
            offload_type=spec.type,
            num_blocks_per_group=spec.blocks,
            use_stream=spec.stream,
        )
    elif not getattr(pipe, "_all_hooks", None) and not _is_sequential(models):
        switch = pipe.enable_model_cpu_offload if spec.mode == "model" else pipe.enable_sequential_cpu_offload
        switch(device=device)


def _is_sequential(models: dict[str, nn.Module]) -> bool:
    return any(hasattr(module, "_hf_hook") for model in models.values() for module in model.modules())


def _has_hook(model: nn.Module, name: str) -> bool:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return any(registry is not None and registry.get_hook(name) is not None for registry in registries)


def _compile(spec: Compile, models: dict[str, nn.Module]) -> Callable[[], None]:
    options = {"mode": spec.mode, "dynamic": spec.dynamic, "backend": spec.backend, "fullgraph": False}
    before = {id(module) for model in models.values() for module in model.modules() if _is_compiled(module)}

    def undo() -> None:
        for model in models.values():
            for module in model.modules():
                if _is_compiled(module) and id(module) not in before:
                    module._compiled_call_impl = None

    for name, model in models.items():
        transformer: Any = model
        if spec.scope == "model":
            transformer.compile(**options)
            continue
        try:
            transformer.compile_repeated_blocks(**options)
        except (AttributeError, ValueError) as error:
            undo()
            raise UnsupportedError(f"extras.compile: scope blocks on {name}: {error}; use scope model") from None
    return undo


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None
