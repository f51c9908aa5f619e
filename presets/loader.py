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
    text = str(name)
    if not text.endswith((".yaml", ".yml")):
        return _check(text, preset_data(text))
    if not Path(text).is_file():
        raise ConfigError("preset", f"no such file: {text}")
    try:
        data = read_yaml(Path(text).read_text(encoding="utf-8"), text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("preset", f"cannot read {text}: {error}") from None
    base = data.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise ConfigError(f"{text}: extends", f"expected the name of a preset, got {base!r}")
        data = merge(_without_replaced(preset_data(base), data), data)
    data.setdefault("name", Path(text).stem)
    return _check(text, data)


def streaming_preset(name: str | Path, own_weights: bool = False) -> Preset:
    """The preset to stream with: that of the model's causal sibling where this one says nothing of streams.

    Args:
        name: preset name or YAML file.
        own_weights: whether the weights are given in place of the preset's; then it stays as it is. Default False.

    Raises:
        ConfigError: as `load_preset`.
    """
    preset = load_preset(name)
    stays = own_weights or preset.stream is not None or preset.causal is None
    return preset if stays else load_preset(str(preset.causal))


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
