"""Composition of the presets that ship: a model at each of its sizes, times every setting that fits it.

- `<family>/_family.yaml`: what all models of a family share.
- `<family>/MODEL.yaml`: a model, its facts, and under `sizes` one entry per preset name.
- `profiles.yaml`: dense, fast, balanced and quality, for every model.
- `methods/METHOD.yaml`: the published settings of a method and the models that they were published for.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from math import ceil
from typing import Any

from dit_accel.errors import ConfigError, near_matches
from dit_accel.presets.files import merge, read_yaml
from dit_accel.presets.schema import IMAGE_TASKS

_METHODS, _FAMILY, _PROFILES = "methods", "_family.yaml", "profiles.yaml"
_SETTING_KEYS = {"variant", "models", "parameters", "schedule", "schedule_2", "extras", "generation", "source"}


def preset_data(name: str) -> dict[str, Any]:
    """The composed data of one preset, by `MODEL` (its recommended variant) or `MODEL/VARIANT`.

    Raises:
        ConfigError: unknown model or variant, with near matches.
    """
    model, slash, variant = name.partition("/")
    if model not in models():
        raise ConfigError("preset", f"unknown preset {name!r}{near_matches(model, models())}")
    data, variants, recommended = models()[model]
    if not slash:
        variant = recommended
    if variant not in variants:
        known = [f"{model}/{one}" for one in variants]
        raise ConfigError("preset", f"unknown preset {name!r}{near_matches(name, known)}")
    return merge({**data, "name": name}, variants[variant])


def preset_names(family: str | None = None) -> list[str]:
    """Names of all presets that ship, or of one family's, sorted."""
    found: list[str] = []
    for model, (data, variants, _) in models().items():
        if family is None or data["family"] == family:
            found += [model, *(f"{model}/{variant}" for variant in variants)]
    return sorted(found)


@cache
def models() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """Every model at each size: its data without a method, its variants, and the recommended one."""
    found: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {}
    profiles = _read(_root() / _PROFILES)
    for file, data in _model_files():
        own, recommended = data.pop("variants", {}), data.pop("recommended", "balanced")
        sizes = data.pop("sizes", {file.removesuffix(".yaml"): {}})
        for name, size in sizes.items():
            if name in found:
                raise ConfigError(file, f"the preset {name!r} stands in two files")
            model = merge(data, size)
            found[name] = (model, {**_fit_profiles(profiles, model), **own}, recommended)
    for variant, model_name, values in _published(set(found)):
        variants = found[model_name][1]
        if variant in variants:
            raise ConfigError(f"methods.{values['method']['name']}", f"{model_name}/{variant} is defined twice")
        variants[variant] = values
    return found


def _model_files() -> Iterator[tuple[str, dict[str, Any]]]:
    for folder in sorted((f for f in _root().iterdir() if f.is_dir() and f.name != _METHODS), key=lambda f: f.name):
        files = {file.name: file for file in folder.iterdir() if file.name.endswith(".yaml")}
        shared = _read(files.pop(_FAMILY)) if _FAMILY in files else {}
        for name in sorted(files):
            yield name, merge(shared, _read(files[name]))


def _fit_profiles(profiles: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    """The profiles for one model; a `warm_up` share of its steps becomes a number of dense steps."""
    kind, found = "image" if model["task"] in IMAGE_TASKS else "video", {}
    for name, values in profiles.items():
        schedule = dict(values.get("schedule", {}))
        if "warm_up" in values:
            schedule["dense_steps"] = ceil(values["warm_up"] * model["generation"]["num_inference_steps"])
        found[name] = {"method": values[kind], "schedule": schedule, "source": values["source"]}
    return found


def _published(known: set[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for file in sorted((_root() / _METHODS).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".yaml"):
            yield from settings_of(file.name, _read(file), known)


def settings_of(where: str, data: dict[str, Any], known: set[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Variant, model and values of every published setting in a method's file.

    Args:
        where: name of the file.
        data: its contents.
        known: names of the models.

    Raises:
        ConfigError: unknown key or model.
    """
    for setting in data["settings"]:
        unknown = set(setting) - _SETTING_KEYS
        if unknown:
            raise ConfigError(where, f"unknown key{near_matches(unknown.pop(), _SETTING_KEYS)}")
        values = {k: v for k, v in setting.items() if k not in ("variant", "models", "parameters")}
        values["method"] = {"name": data["method"], "parameters": setting.get("parameters", {})}
        values["source"] = "; ".join(filter(None, (data["source"], setting.get("source"))))
        for model in setting["models"]:
            if model not in known:
                raise ConfigError(where, f"unknown model {model!r}{near_matches(model, known)}")
            yield setting.get("variant", data["method"]), model, values


def _read(file: Traversable) -> dict[str, Any]:
    return read_yaml(file.read_text(encoding="utf-8"), file.name)


def _root() -> Traversable:
    return resources.files("dit_accel.presets")
