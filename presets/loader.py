"""Load a preset by name or from a file, and check it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dit_accel.errors import ConfigError
from dit_accel.extras.settings import EXTRAS_MODELS
from dit_accel.layer_methods import check_policy
from dit_accel.methods.registry import config_error, get_method
from dit_accel.presets.compose import preset_data, preset_names
from dit_accel.presets.files import merge, read_yaml
from dit_accel.presets.schema import Generation, MethodSpec, ModelFacts, Preset, check_size, check_task
from dit_accel.schedule import Schedule

_OF_THE_MODEL = ("extends", "repository", "causal")
_PARTS = (Generation, MethodSpec, ModelFacts, Preset, Schedule, *EXTRAS_MODELS)


def list_presets(family: str | None = None) -> list[str]:
    """Names of the presets that ship, sorted: every model, and every `model/variant`.

    Args:
        family: only those of this family. Default: all.
    """
    return preset_names(family)


def load_preset(name: str | Path) -> Preset:
    """Load a preset by name, or from a YAML file (a path that ends in .yaml or .yml).

    A file may say `extends: NAME`; its own values are then laid over those of NAME, mapping by mapping,
    its name among them.

    Raises:
        ConfigError: unknown name (with near matches), unreadable file, unknown key, wrong type or value; by path.
    """
    return _check(str(name), _data(str(name)))


def streaming_preset(name: str | Path, own_weights: bool = False) -> Preset:
    """The preset to stream with: that of the model's causal sibling where this one says nothing of streams.

    What a file says itself is laid over the sibling, but for the model that it names.

    Args:
        name: preset name or YAML file.
        own_weights: whether the weights are given in place of the preset's; then it stays as it is. Default False.

    Raises:
        ConfigError: as `load_preset`.
    """
    preset = load_preset(name)
    if own_weights or preset.stream is not None or preset.causal is None:
        return preset
    text = str(name)
    own = _own_data(text) if _is_file(text) else {}
    kept = {key: value for key, value in own.items() if key not in _OF_THE_MODEL}
    return _check(text, _laid_over(_data(preset.causal), kept))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _data(name: str) -> dict[str, Any]:
    """The values of a preset, whole and unchecked."""
    if not _is_file(name):
        return preset_data(name)
    own = _own_data(name)
    base = own.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{name}: extends", f"expected the name of a preset, got {base!r}")
    return {"name": Path(name).stem, **(own if base is None else _laid_over(preset_data(base), own))}


def _own_data(path: str) -> dict[str, Any]:
    """The values that a file says itself."""
    if not Path(path).is_file():
        raise ConfigError("preset", f"no such file: {path}")
    try:
        return read_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("preset", f"cannot read {path}: {error}") from None


def _laid_over(inherited: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """`data` over what it inherits."""
    return merge(_without_replaced(inherited, data), data)


def _without_replaced(inherited: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """What a file inherits: not the parameters of another method or step cache, nor the sibling of other weights."""
    if "repository" in data:
        inherited.pop("causal", None)
    for keys in (("method",), ("extras", "cache")):
        mine, theirs = _at(data, keys), _at(inherited, keys)
        if mine.get("name") not in (None, theirs.get("name")):
            theirs.clear()
    return inherited


def _at(data: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    found: Any = data
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _check(where: str, data: dict[str, Any]) -> Preset:
    try:
        preset = Preset(**data)
    except ValidationError as error:
        known = sorted({name for part in _PARTS for name in part.model_fields} | {"extends"})
        raise config_error(error, f"preset {where}", known) from None
    try:
        method = get_method(preset.method.name, **preset.method.parameters)
        for timetable in (preset.schedule, preset.schedule_2 or preset.schedule):
            check_policy(method, timetable)
        check_size(preset.model, preset.generation)
        check_task(preset.task, preset.model.boundary, preset.generation, preset.schedule_2 is not None)
        preset.extras.check()
    except ConfigError as error:
        raise ConfigError(f"preset {where}.{error.path}", error.message) from None
    return preset
