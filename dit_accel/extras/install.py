"""Switch a preset's extras on, and off again as far as that can be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dit_accel.errors import UnsupportedError
from dit_accel.extras.cache import Guidance, enable_cache
from dit_accel.extras.settings import Compile, Extras, LayerwiseCasting, Offload
from dit_accel.siblings import transformers_of


def install_extras(extras: Extras, pipe: Any, models: dict[str, nn.Module], guidance: Guidance) -> Callable[[], None]:
    """Switch `extras` on; returns what undoes it.

    Step cache and compilation are undone. Casting and offload stay: they say how and where weights are stored.
    Must run before the transformers' forward passes are tracked, so that a cache that changes the batch stands inside.

    Args:
        extras: what to switch on.
        pipe: the pipeline, or the bare transformer.
        models: its transformers by component name.
        guidance: how the generation will run.

    Raises:
        UnsupportedError: what cannot work on this pipeline or machine, by name and with the reason.
    """
    _check_fit(extras, pipe, models)
    undo: list[Callable[[], None]] = []

    def undo_all() -> None:
        for step in reversed(undo):
            step()

    try:
        _switch_on(extras, pipe, models, guidance, undo)
    except BaseException:
        undo_all()
        raise
    return undo_all


def store_weights(extras: Extras, pipe: Any) -> None:
    """Switch on what says how and where weights are stored, for runs that have no step cache and are not compiled.

    Args:
        extras: of the preset that the pipeline was loaded for; see `load_for_preset`.
        pipe: the pipeline.

    Raises:
        UnsupportedError: see `install_extras`.
    """
    models = transformers_of(pipe)
    _check_fit(extras, pipe, models)
    if extras.layerwise_casting is not None:
        _cast(extras.layerwise_casting, models)
    if extras.offload is not None:
        _offload(extras.offload, pipe, models)


def _switch_on(
    extras: Extras, pipe: Any, models: dict[str, nn.Module], guidance: Guidance, undo: list[Callable[[], None]]
) -> None:
    """Every extra in the one order that works; what undoes those that are on goes to `undo`."""
    if extras.layerwise_casting is not None:
        _cast(extras.layerwise_casting, models)
    if extras.cache is not None:
        undo.append(enable_cache(extras.cache, pipe, models, guidance))
    if extras.offload is not None:
        _offload(extras.offload, pipe, models)
    if extras.compile is not None:
        undo.append(_compile(extras.compile, models))


def _check_fit(extras: Extras, pipe: Any, models: dict[str, nn.Module]) -> None:
    offload, accelerator = extras.offload, _accelerator()
    if offload is not None and accelerator == "cpu":
        raise UnsupportedError(
            f"extras.offload: mode {offload.mode} moves weights between an accelerator and main memory, and torch "
            "finds no accelerator here"
        )
    if offload is not None and offload.stream and accelerator.split(":")[0] not in ("cuda", "xpu"):
        raise UnsupportedError(
            f"extras.offload: stream is for CUDA and XPU devices, and the accelerator is {accelerator}"
        )
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


def _accelerator() -> str:
    from diffusers.utils.torch_utils import get_device

    return str(get_device())


def _cast(spec: LayerwiseCasting, models: dict[str, nn.Module]) -> None:
    for model in models.values():
        transformer: Any = model
        if not _has_hook(model, "layerwise_casting"):
            transformer.enable_layerwise_casting(getattr(torch, spec.storage), compute_dtype=transformer.dtype)


def _offload(spec: Offload, pipe: Any, models: dict[str, nn.Module]) -> None:
    device = torch.device(_accelerator())
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
