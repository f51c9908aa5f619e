"""Diffusers' step caches: which there are, their parameters, and on which pipelines they are right.

A cache skips attention calls; a skipped call never reaches the engine, so what a method keeps stays as the last
computed step left it, with the step that it was made at.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model
from torch import Tensor, nn

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.extras.settings import StepCache
from dit_accel.methods.registry import config_error

_CONFIGS = {
    "first_block": "FirstBlockCacheConfig",
    "mag": "MagCacheConfig",
    "taylorseer": "TaylorSeerCacheConfig",
    "pab": "PyramidAttentionBroadcastConfig",
    "faster": "FasterCacheConfig",
    "sea": "SeaCacheConfig",
}
_NEEDS_CONTEXT = ("first_block", "taylorseer")
_NEEDS_TIMESTEP = ("pab", "faster")
_SKIPS_BLOCKS = ("first_block", "mag", "sea")
# Models whose last block returns text and image as one tensor and whose first block returns two.
_FUSED_TAIL = ("Flux2Transformer2DModel",)
_FILLED_IN = ("num_inference_steps", "is_guidance_distilled", "tensor_format")
_ATTENTION = r"(.*_)?blocks\.\d+\.attn\d?"
_Finite = Annotated[float, Field(allow_inf_nan=False)]


def check_cache(spec: StepCache) -> None:
    """Check the parameters against Diffusers' own config class.

    Raises:
        ConfigError: this Diffusers has no such cache, unknown parameter, wrong type.
    """
    kind = _config_class(spec.name)
    schema = _schema(kind)
    try:
        schema(**spec.parameters)
    except ValidationError as error:
        raise config_error(error, "extras.cache.parameters", list(schema.model_fields)) from None


@dataclasses.dataclass(frozen=True)
class Guidance:
    """How a generation guides, as far as a step cache must know.

    Args:
        steps: denoising steps.
        guidance_scale, true_cfg_scale: as passed to the pipeline; None: its default.
    """

    steps: int
    guidance_scale: float | None = None
    true_cfg_scale: float | None = None


def enable_cache(spec: StepCache, pipe: Any, models: dict[str, nn.Module], guidance: Guidance) -> Callable[[], None]:
    """Switch the cache on in every transformer; returns what switches it off.

    Args:
        spec: the cache, already checked.
        pipe: the pipeline, or the bare transformer.
        models: its transformers by component name.
        guidance: how the generation will run.

    Raises:
        UnsupportedError: the cache cannot be right on this pipeline; with the reason.
    """
    for model in models.values():
        reason = _model_reason(spec.name, model, len(models) > 1) or _pipeline_reason(spec.name, pipe, guidance)
        if reason is not None:
            raise UnsupportedError(f"extras.cache: {spec.name} cannot run on {type(pipe).__name__}: {reason}")
    done: list[Any] = []

    def disable() -> None:
        for model in done:
            if model.is_cache_enabled:
                model.disable_cache()

    for component, model in models.items():
        transformer: Any = model
        before = _hook_count(model)
        try:
            transformer.enable_cache(_make_config(spec, pipe, guidance))
            done.append(transformer)
            if _hook_count(model) == before:
                raise ValueError("its identifiers match no module, so it would do nothing")
        except (ValueError, AttributeError, KeyError) as error:
            disable()
            raise UnsupportedError(f"extras.cache: {spec.name} on {component}: {_first_line(error)}") from None
    return disable


def _hook_count(model: nn.Module) -> int:
    registries = (getattr(module, "_diffusers_hook", None) for module in model.modules())
    return sum(len(registry.hooks) for registry in registries if registry is not None)


def _make_config(spec: StepCache, pipe: Any, guidance: Guidance) -> Any:
    import torch

    kind, source = _config_class(spec.name), _call_source(pipe)
    values: dict[str, Any] = {n: tuple(v) if isinstance(v, list) else v for n, v in spec.parameters.items()}
    if spec.name in _NEEDS_TIMESTEP:
        values["current_timestep_callback"] = lambda: pipe.current_timestep
    if spec.name == "faster":
        values["is_guidance_distilled"] = "cond_uncond" not in source or not _above_one(guidance.guidance_scale)
        values["tensor_format"] = "BFCHW"  # of CogVideoX, the only family that batches its two branches
    if spec.name == "mag":
        values["num_inference_steps"] = guidance.steps
        values["mag_ratios"] = list(_mag_ratios(spec, pipe))
    if spec.name == "taylorseer" and not values.get("use_lite_mode"):
        # Diffusers' own default must match a whole name, and so misses the "attn1" of Wan and CogVideoX.
        values.setdefault("cache_identifiers", [_ATTENTION])
    if values.get("taylor_factors_dtype") is not None:
        values["taylor_factors_dtype"] = getattr(torch, values["taylor_factors_dtype"])
    return kind(**values)


def _mag_ratios(spec: StepCache, pipe: Any) -> Any:
    if "mag_ratios" in spec.parameters:
        return spec.parameters["mag_ratios"]
    if not any(cls.__name__ == "FluxPipeline" for cls in type(pipe).__mro__):
        raise ValueError(
            "mag_ratios are not known for this model; run it once with Diffusers' MagCacheConfig(calibrate=True)"
        )
    from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS

    return FLUX_MAG_RATIOS


def _model_reason(name: str, model: Any, has_two: bool) -> str | None:
    if not hasattr(model, "enable_cache"):
        return f"{type(model).__name__} has no step caches"
    if model.is_cache_enabled:
        return "a step cache is on already; switch it off with disable_cache()"
    if name in _SKIPS_BLOCKS and hasattr(model, "vace_blocks"):
        return "VACE adds its hints between the blocks that this cache skips, which would count them twice"
    if name == "first_block" and type(model).__name__ in _FUSED_TAIL:
        return "its last block returns text and image in one, which this cache cannot compare with its first block's"
    if name in ("mag", "sea") and has_two:
        return "it counts the steps of one transformer, and this pipeline has two"
    return None


def _pipeline_reason(name: str, pipe: Any, guidance: Guidance) -> str | None:
    source = _call_source(pipe)
    if isinstance(pipe, nn.Module):
        return "it reads the pipeline's timestep, and this is a bare transformer" if name in _NEEDS_TIMESTEP else None
    if name in _NEEDS_CONTEXT and "cache_context" not in source:
        return "Diffusers' pipeline does not name its guidance branches (no cache_context)"
    if name == "sea" and "step_index" not in source:
        return "Diffusers' pipeline does not say step and noise level to the cache, which would then never skip"
    if name in _NEEDS_TIMESTEP and not hasattr(type(pipe), "current_timestep"):
        return "Diffusers' pipeline has no current_timestep"
    mixes = name in _NEEDS_TIMESTEP or (name == "mag" and "cache_context" not in source)
    if mixes and _calls_twice(source, guidance):
        return "it does not tell two guidance branches that are called in turn apart, and would mix them"
    return None


def _calls_twice(source: str, guidance: Guidance) -> bool:
    """Whether the transformer is called once per guidance branch, not once for both."""
    if "true_cfg_scale" in source:
        return guidance.true_cfg_scale is not None and guidance.true_cfg_scale > 1
    if "cond_uncond" in source or "cache_context" not in source:
        return False
    return _above_one(guidance.guidance_scale)


def _above_one(scale: float | None) -> bool:
    return scale is None or scale > 1


def _call_source(pipe: Any) -> str:
    """Source of the Diffusers pipeline's `__call__`; empty for a bare transformer."""
    stock = next((c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.pipelines.")), None)
    return "" if stock is None else _source(stock)


@cache
def _source(stock: Any) -> str:
    return inspect.getsource(inspect.unwrap(stock.__call__))


@cache
def _config_class(name: str) -> Any:
    import diffusers

    kind = getattr(diffusers, _CONFIGS[name], None) or getattr(diffusers.hooks, _CONFIGS[name], None)
    if kind is None:
        raise ConfigError("extras.cache.name", f"Diffusers {diffusers.__version__} has no {_CONFIGS[name]}")
    return kind


@cache
def _schema(kind: Any) -> type[BaseModel]:
    """A strict schema of a Diffusers config class, without callbacks and what is filled in."""
    hints = typing.get_type_hints(kind)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if "Callable" in str(hint) or field.name.startswith("_") or field.name in (*_FILLED_IN, "calibrate"):
            continue
        fields[field.name] = (_field_type(hint), field.default)
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", strict=True), **fields)


def _field_type(hint: Any) -> Any:
    """The type as YAML can write it: dtypes by name, tensors as lists of numbers, tuples as lists."""
    parts = typing.get_args(hint)
    if Tensor in parts or hint is Tensor:
        return list[_Finite] | None
    if any("torch.dtype" in str(part) or "'dtype'" in str(part) for part in (hint, *parts)):
        return Literal["float32", "bfloat16", "float16"] | None
    if hint is float:
        return _Finite
    if "tuple" in str(hint):
        return Annotated[hint, BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)]
    return hint


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
