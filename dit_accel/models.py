"""Load a Diffusers pipeline: from a folder, from the hub, or the small one that ships."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError

_SHIPPED = "samples/"
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
        ConfigError: a dtype that is not known, or CUDA asked for where there is none.
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
    if dtype == "auto":
        dtype = "float32" if kind == "cpu" else "bfloat16"
    return device, getattr(torch, dtype)


def load_pipeline(model: str, device: str = "auto", dtype: str = "auto", pipeline_class: Any = None) -> Any:
    """Load a pipeline from safetensors and move it to its device.

    Args:
        model: pipeline folder, hub id, or `samples/...`.
        device: torch device or "auto".
        dtype: "auto", "float32", "bfloat16" or "float16".
        pipeline_class: Diffusers class. Default: what the folder says.

    Raises:
        ConfigError: the model cannot be found or is not a pipeline.
    """
    source = check_model(model)
    where, kind = resolve_device(device, dtype)
    from diffusers import DiffusionPipeline

    try:
        pipe = (pipeline_class or DiffusionPipeline).from_pretrained(source, dtype=kind, use_safetensors=True)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError("model", f"cannot load {model}: {str(error).splitlines()[0]}") from error
    return pipe.to(where)
