"""The one table of methods: name to class."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, TypeVar

from pydantic import ValidationError

from dit_accel.errors import ConfigError, near_matches
from dit_accel.methods.base import Method

_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(name: str) -> Callable[[M], M]:
    """Class decorator that enters a method under `name`.

    Raises:
        ConfigError: the name is taken.
    """

    def enter(cls: M) -> M:
        if name in _METHODS:
            raise ConfigError("method", f"{name!r} is registered twice ({_METHODS[name].__module__}, {cls.__module__})")
        cls.name = name
        _METHODS[name] = cls
        return cls

    return enter


@cache
def _load_all() -> None:
    """Import every module of this package, so that adding a method means adding one file."""
    package = importlib.import_module("dit_accel.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"dit_accel.methods.{module.name}")


def list_methods() -> list[str]:
    """Names of all methods, sorted."""
    _load_all()
    return sorted(_METHODS)


def method_class(name: str) -> type[Method]:
    """The class registered under `name`.

    Raises:
        ConfigError: no such method; the message offers near matches.
    """
    _load_all()
    if name not in _METHODS:
        raise ConfigError("method", f"unknown method {name!r}{near_matches(name, _METHODS)}")
    return _METHODS[name]


def get_method(name: str, **parameters: Any) -> Method:
    """Make the method `name` with `parameters`; what is left out takes the method's default.

    Raises:
        ConfigError: unknown method or parameter, wrong type (a boolean is no integer), value out of range, NaN.
    """
    cls = method_class(name)
    try:
        return cls(**parameters)
    except ValidationError as error:
        raise config_error(error, f"method.{name}", list(cls.parameters())) from None


def with_parameters(method: Method, changes: Mapping[str, Any]) -> Method:
    """The method with other parameters; the rest stay as they were given. See `merged_parameters`.

    Raises:
        ConfigError: as `get_method`.
    """
    return get_method(method.name, **merged_parameters(method.model_dump(exclude_unset=True), changes))


def merged_parameters(own: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a method with `changes` in their place.

    A `density` takes the place of `densities` too, which would decide in its stead.
    """
    replaced = {"densities"} if "density" in changes else set()
    return {**{key: value for key, value in own.items() if key not in replaced}, **changes}


def config_error(error: ValidationError, path: str, known: list[str]) -> ConfigError:
    """Turn the first fault of a pydantic error into a `ConfigError` with a dotted path and both values."""
    first = error.errors()[0]
    where = ".".join([path, *(str(part) for part in first["loc"])])
    if first["type"] == "extra_forbidden":
        return ConfigError(where, f"unknown key{near_matches(str(first['loc'][-1]), known)}")
    return ConfigError(where, f"{first['msg'].lower().replace('input should be', 'expected')}, got {first['input']!r}")
