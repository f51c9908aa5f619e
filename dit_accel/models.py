"""Load a Diffusers pipeline (from a folder, from the hub, one that ships, a tiny random one) and call it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.extras.install import offload_device
from dit_accel.extras.settings import Extras, quantization_config
from dit_accel.flow_shift import set_flow_shift
from dit_accel.presets import Generation, Preset

_SHIPPED = "samples/"
TINY = "tiny"
"""Name of the model that is made in place of the preset's: random weights, nothing to download."""
DTYPES = ("auto", "float32", "bfloat16", "float16")


def shipped_model(name: str) -> Path:
    """Folder of a model that ships with the library, by its name under `samples/`.

    Raises:
        ConfigError: it is not there (an incomplete installation).
    """
    folder = Path(str(resources.files("dit_accel.samples") / name))
    if not (folder / "model_index.json").is_file():
        raise ConfigError("model", f"the model {name!r} is missing from this installation; install it again")
    return folder


def quiet_loading() -> None:
    """Switch off the libraries' own bars for loading weights, for commands that say what they load."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def check_model(model: str) -> str:
    """Where to load `model` from: a local pipeline folder, or a hub id, unchanged.

    Raises:
        ConfigError: a local folder that is not a Diffusers pipeline, or a path that does not exist.
    """
    if model.startswith(_SHIPPED):
        return str(shipped_model(model.removeprefix(_SHIPPED)))
    path = Path(model).expanduser()
    if path.exists():
        index = path / "model_index.json"
        if not index.is_file():
            raise ConfigError("model", f"{model} is not a Diffusers pipeline: it has no model_index.json")
        try:
            json.loads(index.read_text(encoding="utf-8"))["_class_name"]
        except (ValueError, KeyError, TypeError):
            raise ConfigError("model", f"{index} does not name a pipeline class") from None
        return str(path)
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise ConfigError("model", f"no such folder: {model} (a hub id has the form owner/name)")
    return model


def resolve_device(device: str, dtype: str) -> tuple[str, Any]:
    """Device and torch dtype; "auto" takes CUDA with bfloat16 where there is one, else the CPU with float32.

    Raises:
        ConfigError: a dtype that is not known, or a device that is not there.
    """
    import torch

    if dtype not in DTYPES:
        raise ConfigError("dtype", f"expected one of {', '.join(DTYPES)}, got {dtype!r}")
    has_cuda = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if has_cuda else "cpu"
    if device.startswith("cuda") and not has_cuda:
        raise ConfigError("device", "cuda was asked for, but torch finds no CUDA device here; use --device cpu")
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise ConfigError("device", f"expected a torch device such as cpu or cuda:0, got {device!r}") from None
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError("device", f"{device} cannot be used here: {str(error).strip().splitlines()[0]}") from None
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return device, getattr(torch, dtype)


def load_pipeline(
    model: str, device: str = "auto", dtype: str = "auto", pipeline_class: Any = None, extras: Extras | None = None
) -> Any:
    """Load a pipeline from safetensors and move it to its device.

    Args:
        model: pipeline folder, hub id, or `samples/...`.
        device: torch device or "auto".
        dtype: "auto", "float32", "bfloat16" or "float16".
        pipeline_class: Diffusers class. Default: what the folder says.
        extras: of a preset. Quantisation happens here, while weights are read; with offload, weights stay in main
            memory. Default None: neither.

    Raises:
        ConfigError: the model cannot be found or is not a pipeline, or its quantisation cannot be made here.
    """
    source = check_model(model)
    where, kind = resolve_device(device, dtype)
    options: dict[str, Any] = {"dtype": kind, "use_safetensors": True}
    if extras is not None and extras.quantization is not None:
        options["quantization_config"] = quantization_config(extras.quantization)
    from diffusers import DiffusionPipeline

    try:
        pipe = (pipeline_class or DiffusionPipeline).from_pretrained(source, **options)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("model", f"cannot load {model}: {str(error).splitlines()[0]}") from error
    return pipe if extras is not None and extras.offload is not None else pipe.to(where)


def load_for_preset(
    preset: Preset, model: str | None, device: str = "auto", dtype: str = "auto", pipeline_class: Any = None
) -> Any:
    """Load the model that a preset is for, or `model` in its place; noise is shifted as the preset says.

    Args:
        preset: says the model, what to do while loading, and the shift of the noise schedule.
        model: pipeline folder, hub id, or "tiny": random weights at the structure of the preset's model, made here.
            Default None: the preset's.
        device, dtype: as in `load_pipeline`.
        pipeline_class: Diffusers class. Default: the preset's.

    Raises:
        ConfigError: see `load_pipeline`; "tiny" with quantisation, since nothing is loaded then.
        UnsupportedError: offload without an accelerator, see `offload_device`.
    """
    if preset.extras.offload is not None:
        offload_device(preset.extras.offload, device)
    cls = pipeline_class or stock_pipeline(preset.pipeline)
    if model == TINY:
        pipe = _tiny(preset, cls, device, dtype)
    else:
        pipe = load_pipeline(model or preset.repository, device, dtype, cls, preset.extras)
    set_flow_shift(pipe, preset.model.flow_shift)
    return pipe


def _tiny(preset: Preset, cls: Any, device: str, dtype: str) -> Any:
    """The tiny random model of a preset, as a pipeline of class `cls`."""
    if preset.extras.quantization is not None:
        raise ConfigError(
            "extras.quantization", "weights are quantised while loading, and the tiny model is not loaded"
        )
    from dit_accel.samples.tiny_random import tiny_pipeline

    where, kind = resolve_device(device, dtype)
    pipe = tiny_pipeline(preset.tiny)
    config = {key: value for key, value in pipe.config.items() if key in signature(cls).parameters}
    pipe = cls(**{**config, **pipe.components})
    if str(kind) != "torch.float32":
        pipe = pipe.to(dtype=kind)
    return pipe if preset.extras.offload is not None else pipe.to(where)


def fit_to_model(preset: Preset, model: str | None) -> Preset:
    """The preset at a size for what `load_for_preset` gives: the tiny model has a size of its own.

    Args:
        preset: as it was loaded, before anything is laid over it.
        model: as in `load_for_preset`.
    """
    if model != TINY:
        return preset
    from dit_accel.samples.tiny_random import tiny_arguments

    arguments = {"height": 32, "width": 48, **tiny_arguments(preset.tiny)}
    names: list[str] = ["height", "width", "num_frames"]
    sizes = {name: arguments[name] for name in names if name in arguments}
    return preset.model_copy(update={"generation": preset.generation.model_copy(update=sizes)})


def stock_pipeline(name: str) -> Any:
    """The Diffusers pipeline class called `name`.

    Raises:
        ConfigError: this version of Diffusers has none.
    """
    import diffusers

    cls = getattr(diffusers, name, None)
    if not isinstance(cls, type):
        raise ConfigError("pipeline", f"Diffusers {diffusers.__version__} has no pipeline {name}")
    return cls


def call_parameters(pipeline_class: Any) -> Mapping[str, Parameter]:
    """The parameters of the Diffusers pipeline's own call, without `self`."""
    stock = next(cls for cls in pipeline_class.__mro__ if cls.__module__.startswith("diffusers."))
    parameters = dict(signature(stock.__call__).parameters)
    parameters.pop("self")
    return parameters


def call_arguments(pipe: Any, generation: Generation) -> dict[str, Any]:
    """A preset's generation values as arguments of this pipeline's call; what the call does not take is left out."""
    known = call_parameters(type(pipe))
    values = generation.model_dump(exclude_none=True, exclude={"fps"})
    if not values["negative_prompt"] and "true_cfg_scale" in known:
        values.pop("negative_prompt")  # an empty one would be encoded for nothing
    values = {name: value for name, value in values.items() if name in known}
    if "max_area" in known:  # FLUX Kontext otherwise turns every size into one of a megapixel
        values |= {"max_area": generation.height * generation.width, "_auto_resize": False}
    return values


def set_guider(pipe: Any, generation: Generation) -> None:
    """Set the guidance of a pipeline that holds it in a guider, not in an argument of its call (HunyuanVideo 1.5)."""
    guider, scale = getattr(pipe, "guider", None), generation.guidance_scale
    if guider is not None and scale is not None and guider.guidance_scale != scale:
        pipe.guider = guider.new(guidance_scale=scale)
