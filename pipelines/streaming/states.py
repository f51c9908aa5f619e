"""A stream's state as one safetensors file: tensors by their path, everything else as JSON in the header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.errors import ConfigError

_TENSOR = "__tensor__"
_TUPLE = "__tuple__"


def save_state(state: dict[str, Any], path: str | Path) -> None:
    """Write a tree of dicts (with text keys), lists, tuples, tensors, numbers, texts and None.

    Args:
        state: the tree.
        path: file to write, usually ".safetensors".
    """
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(_pack(state, "", tensors))
    # safetensors refuses tensors that share memory.
    save_file({name: x.detach().cpu().clone().contiguous() for name, x in tensors.items()}, path, {"tree": tree})


def load_state(path: str | Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what `save_state` wrote, tensors on `device`.

    Raises:
        ConfigError: no such file, or not one of `save_state`.
    """
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tree = json.loads((file.metadata() or {})["tree"])
            return _unpack(tree, file)
    except (OSError, KeyError, ValueError) as error:
        raise ConfigError("state", f"cannot read a stream's state from {path}: {error}") from error


def check_origin(saved: Any, own: dict[str, Any]) -> None:
    """Whether a state fits the stream that is to take it over.

    Args:
        saved: what the state says of the stream that it was taken from: dicts of texts, numbers, lists and None.
        own: the same of this stream.

    Raises:
        ConfigError: they differ; the message says in what.
    """
    if not isinstance(saved, dict):
        raise ConfigError("state", "does not say which stream it is of; save it with this version of the library")
    there, here = _flat(saved), _flat(own)
    differ = [name for name in sorted({*there, *here}) if there.get(name) != here.get(name)]
    if differ:
        what = "; ".join(f"{name} is {there.get(name)!r} there and {here.get(name)!r} here" for name in differ)
        raise ConfigError("state", f"is of another stream: {what}; begin this one like that one")


def _flat(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """The leaves of nested dicts by their dotted path."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{path}{name}.") if isinstance(value, dict) else {f"{path}{name}": value}
    return flat


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {key: _pack(item, f"{path}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    return value


def _unpack(value: Any, file: Any) -> Any:
    if isinstance(value, list):
        return [_unpack(item, file) for item in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return file.get_tensor(value[_TENSOR])
    if _TUPLE in value:
        return tuple(_unpack(item, file) for item in value[_TUPLE])
    return {key: _unpack(item, file) for key, item in value.items()}
