"""What is compared: presets, or methods with parameters, each written as one word on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from dit_accel.errors import ConfigError, near_matches
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method, list_methods
from dit_accel.presets import Preset, list_presets, load_preset
from dit_accel.resolve import resolve_policy, second_schedule
from dit_accel.schedule import ALL_DENSE, Schedule

DENSE = "dense"
CEILING = "dense, other kernel"


@dataclass(frozen=True)
class Candidate:
    """One way to generate.

    Args:
        label: as it stands in tables.
        method, schedule: what runs.
        options: other arguments of `accelerate`.
        preset: where both come from, with what else a preset holds (a second schedule, step caches). None: no preset.
    """

    label: str
    method: Method
    schedule: Schedule
    options: dict[str, Any] = field(default_factory=dict)
    preset: Preset | None = None


def parse_candidate(text: str, base: Preset) -> Candidate:
    """A candidate from `PRESET`, `FILE.yaml` or `METHOD[:KEY=VALUE,...]`.

    A method keeps the schedules of `base`, but for their head tables, and runs in all heads; keys may be parameters of
    the method or fields of both schedules, and values are YAML: ``composed:density=0.2,tile=[4,4,4],dense_steps=2``;
    null is for parameters that may be left unset: ``composed:density=null,mass=0.9``.

    Raises:
        ConfigError: neither a preset nor a method, or a preset of another family; wrong parameters.
    """
    name, _, rest = text.partition(":")
    if text in list_presets() or text.endswith((".yaml", ".yml")):
        preset = load_preset(text)
        if preset.family != base.family:
            raise ConfigError(text, f"is for family {preset.family!r}; the others are for {base.family!r}")
        method, schedule = resolve_policy(preset, None, None, {})
        return Candidate(text, method, schedule, preset=preset)
    if name not in list_methods():
        raise ConfigError("candidate", f"{text!r} is no preset and no method{near_matches(name, list_methods())}")
    values = _values(rest, text)
    timing = {key: value for key, value in values.items() if key in Schedule.model_fields}
    method, schedule = resolve_policy(base, name, None, values)
    second = second_schedule(base, None, None, timing, ("transformer_2",), method, name)
    return Candidate(text, method, schedule, {} if second is None else {"schedule_2": second})


def _values(words: str, text: str) -> dict[str, Any]:
    """What `KEY=VALUE,...` says; null is a value, nothing at all is none."""
    mapping = "{" + words.replace("=", ": ") + "}"
    try:
        node, values = yaml.compose(mapping, yaml.SafeLoader), yaml.safe_load(mapping)
    except yaml.YAMLError:
        node, values = None, None
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    if not isinstance(values, dict) or any(value.tag.endswith(":null") and not value.value for _, value in pairs):
        raise ConfigError("candidate", f"{text!r}: expected METHOD:KEY=VALUE,KEY=VALUE")
    return {str(key): value for key, value in values.items()}


def references(base: Preset) -> tuple[Candidate, Candidate]:
    """Dense, and dense computed by our kernel at full density: their difference is rounding, the best to be had.

    Dense runs as the dense steps of all others do, by the fastest dense attention known here. So what the others gain
    is due to what they leave out.
    """
    dense, _ = resolve_policy(base, "dense", Schedule(), {})
    fastest = {"method": get_method("composed"), "schedule": ALL_DENSE}
    whole = {"order": "raster", "density": 1.0, "remainder": "drop"}
    full, _ = resolve_policy(base, "composed", Schedule(), whole)
    return Candidate(DENSE, dense, Schedule(), fastest), Candidate(CEILING, full, Schedule(), {"break_even": 1.0})


def all_candidates(texts: Sequence[str], base: Preset, ceiling: bool = True) -> list[Candidate]:
    """Dense first, then the ceiling, then what is asked for; without texts, the other presets of the same model.

    Raises:
        ConfigError: one is wrong, or a preset quantises otherwise than `base`, for which the weights are loaded.
    """
    model = base.name.split("/")[0]
    texts = texts or [name for name in list_presets(base.family) if name.startswith(f"{model}/")]
    asked = [parse_candidate(text, base) for text in dict.fromkeys(texts)]
    for candidate in asked:
        if candidate.preset is not None and candidate.preset.extras.quantization != base.extras.quantization:
            raise ConfigError(
                candidate.label, f"quantises other than --preset {base.name}, and all run on weights loaded once"
            )
    dense, whole = references(base)
    others = [candidate for candidate in asked if candidate.method.name != "dense" or candidate.schedule.head_table]
    return [dense, *([whole] if ceiling else []), *others]
