"""The one table of families, by the name of Diffusers' transformer class."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import TypeVar

from torch import nn

from dit_accel.errors import UnsupportedError
from dit_accel.families.base import Family
from dit_accel.families.generic import GenericFamily

_FAMILIES: dict[str, Family] = {}
F = TypeVar("F", bound=type[Family])


def register_family(cls: F) -> F:
    """Class decorator that enters a family under the names of its transformer classes."""
    family = cls()
    for name in cls.transformer_classes:
        _FAMILIES[name] = family
    return cls


@cache
def _load_all() -> None:
    package = importlib.import_module("dit_accel.families")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dit_accel.families.{module.name}")


def family_names() -> list[str]:
    """Names of all families, sorted."""
    _load_all()
    return sorted({family.name for family in _FAMILIES.values()})


def family_of(model: nn.Module) -> Family:
    """The family that knows `model`, looked up by the names of its class and base classes; else the generic one.

    Raises:
        UnsupportedError: no family can serve the class; the message lists those that are known.
    """
    _load_all()
    for cls in type(model).__mro__:
        if cls.__name__ in _FAMILIES:
            return _FAMILIES[cls.__name__]
    if GenericFamily.fits(model):
        return GenericFamily()
    raise UnsupportedError(
        f"no family for {type(model).__name__}; known transformer classes: {', '.join(sorted(_FAMILIES))}"
    )
