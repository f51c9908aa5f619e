"""How a chunk attends to what it sees, by name: what a preset or the command line says becomes an attention policy."""

from __future__ import annotations

import typing
from collections.abc import Callable
from inspect import signature
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model

from dit_accel.errors import ConfigError, near_matches
from dit_accel.methods.registry import config_error, get_method, list_methods
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.planned import PlannedContext, refusal
from dit_accel.streaming import StreamSettings

POLICIES: dict[str, type[DenseContext]] = {
    "dense": DenseContext,
    "light_forcing": LightForcing,
    "flashblock": FlashBlock,
    "compressed_memory": CompressedMemory,
}
"""What a stream has besides the methods of the library, which run inside its window (`PlannedContext`)."""


def make_policy(settings: StreamSettings, path: str = "stream.attention") -> Callable[[], DenseContext]:
    """What makes the policy of a guidance branch, from `settings.attention`; everything is checked now.

    Args:
        settings: of the stream; its window is the default of policies that have one.
        path: dotted path for the message of an error.

    Raises:
        ConfigError: neither a policy nor a method, a method that cannot run here, an unknown or wrong parameter, or a
            memory without a window or with a rolling one.
    """
    name, parameters = settings.attention.name, dict(settings.attention.parameters)
    policy = POLICIES.get(name)
    if policy is None:
        if name not in list_methods():
            known = [*POLICIES, *list_methods()]
            raise ConfigError(f"{path}.name", f"unknown stream attention {name!r}{near_matches(name, known)}")
        method = get_method(name, **parameters)
        if (reason := refusal(method)) is not None:
            raise ConfigError(f"{path}.name", f"{name!r} cannot run inside a stream: {reason}; choose another")
        return lambda: PlannedContext(method)
    if policy is CompressedMemory and settings.window is None:
        raise ConfigError(path, "compressed_memory keeps the frames that leave the window: set a window")
    if policy is CompressedMemory and settings.rolling:
        # Frames between the two would be neither seen nor remembered.
        reason = "compressed_memory keeps the frames that leave the cache, which a rolling window leaves before"
        raise ConfigError(path, f"{reason}: set rolling to false, or choose another attention")
    schema = _schema(policy)
    if settings.window is not None and "window" in schema.model_fields:
        parameters.setdefault("window", settings.window)
    try:
        values = schema(**parameters)
    except ValidationError as error:
        raise config_error(error, f"{path}.parameters", list(schema.model_fields)) from None
    checked = {key: getattr(values, key) for key in values.model_fields_set}
    policy(**checked)
    return lambda: policy(**checked)


def _schema(policy: type[DenseContext]) -> type[BaseModel]:
    """A strict schema of the arguments of a policy's constructor; lists stand for tuples and sets."""
    if policy.__init__ is object.__init__:
        return create_model(policy.__name__, __config__=_STRICT)
    hints = typing.get_type_hints(policy.__init__)
    fields: dict[str, Any] = {
        name: (Annotated[hints[name], _FROM_LIST] if "tuple" in str(hints[name]) else hints[name], parameter.default)
        for name, parameter in signature(policy).parameters.items()
    }
    return create_model(policy.__name__, __config__=_STRICT, **fields)


_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
