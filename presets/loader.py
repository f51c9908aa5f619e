"""Find, read, merge and check presets."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dit_accel.errors import ConfigError, near_matches
from dit_accel.methods.registry import config_error, get_method
from dit_accel.presets.schema import Generation, MethodSpec, ModelFacts, Preset, check_size
from dit_accel.schedule import Schedule

_PARTS = (Generation, MethodSpec, ModelFacts, Preset, Schedule)
_DENSE = {"method": {"name": "dense"}, "schedule": {}, "source": "the model as published, without acceleration"}


class _UniqueKeys(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice."""


def _mapping(loader: _UniqueKeys, node: yaml.MappingNode) -> dict[Any, Any]:
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    if twice:
        raise yaml.constructor.ConstructorError(
            None, None, f"key given twice: {', '.join(map(str, twice))}", node.start_mark
        )
    return loader.construct_mapping(node, deep=True)


_UniqueKeys.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def list_presets(family: str | None = None) -> list[str]:
    """Names of the presets that ship, sorted: every model, and every `model/variant`.

    Args:
        family: only those of this family. Default: all.
    """
    return sorted(n for n, (_, data) in _shipped().items() if family is None or data["family"] == family)


def load_preset(name: str | Path) -> Preset:
    """Load a preset by name, or from a YAML file (a path that ends in .yaml or .yml).

    A file may say `extends: NAME`; its own values are then laid over those of NAME, mapping by mapping.

    Raises:
        ConfigError: unknown name (with near matches), unreadable file, unknown key, wrong type or value; by path.
    """
    text = str(name)
    if not text.endswith((".yaml", ".yml")):
        return _check(text, _shipped_data(text))
    data = _read(Path(text).read_text(encoding="utf-8") if Path(text).is_file() else None, text)
    base = data.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{text}: extends", f"expected the name of a preset, got {base!r}")
        inherited = _shipped_data(base)
        if data.get("method", {}).get("name") not in (None, inherited["method"]["name"]):
            inherited = {**inherited, "method": {}}  # parameters of another method do not carry over
        data = _merge(inherited, data)
    data.setdefault("name", Path(text).stem)
    return _check(text, data)


def _shipped_data(name: str) -> dict[str, Any]:
    known = _shipped()
    if name not in known:
        raise ConfigError("preset", f"unknown preset {name!r}{near_matches(name, known)}")
    return known[name][1]


@cache
def _shipped() -> dict[str, tuple[str, dict[str, Any]]]:
    """Every shipped preset by name: its file and its data with the variant laid over the model."""
    presets: dict[str, tuple[str, dict[str, Any]]] = {}
    root = resources.files("dit_accel.presets")
    for folder in sorted((f for f in root.iterdir() if f.is_dir()), key=lambda f: f.name):
        for file in sorted(folder.iterdir(), key=lambda f: f.name):
            if not file.name.endswith(".yaml"):
                continue
            data = _read(file.read_text(encoding="utf-8"), file.name)
            variants = {"dense": _DENSE, **data.pop("variants", {})}
            recommended = data.pop("recommended")
            name = file.name.removesuffix(".yaml")
            presets[name] = (file.name, _merge({**data, "name": name}, variants[recommended]))
            for variant, values in variants.items():
                presets[f"{name}/{variant}"] = (file.name, _merge({**data, "name": f"{name}/{variant}"}, values))
    return presets


def _read(text: str | None, where: str) -> dict[str, Any]:
    if text is None:
        raise ConfigError("preset", f"no such file: {where}")
    try:
        data = yaml.load(text, Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}:" if mark else ""
        raise ConfigError(where, f"not YAML:{line} {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(where, f"expected a mapping, got {type(data).__name__}")
    return data


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _check(where: str, data: dict[str, Any]) -> Preset:
    try:
        preset = Preset(**data)
    except ValidationError as error:
        known = sorted({name for part in _PARTS for name in part.model_fields} | {"extends"})
        raise config_error(error, f"preset {where}", known) from None
    try:
        get_method(preset.method.name, **preset.method.parameters)
        check_size(preset.model, preset.generation)
    except ConfigError as error:
        raise ConfigError(f"preset {where}.{error.path}", error.message) from None
    return preset
