"""Heads of a layer that differ in density alone run as one: one order, one selection, one call of the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dit_accel.head_table import HeadGroup
from dit_accel.methods.base import Method
from dit_accel.methods.registry import with_parameters


def without_density(method: Method) -> Method:
    """What is left of a method when its density is left out; the method itself where heads cannot differ in it.

    Methods of which the same is left make the same order, keep the same things between calls, and can run as one.
    """
    if not method.keeps_shares or method.requested_density is None:
        return method
    return method.model_copy(update={"density": None, "densities": None})


def at_density(method: Method, density: float) -> Method:
    """The method at another density; heads that have densities of their own are scaled alike, up to 1.

    Raises:
        ConfigError: the method takes no density beside its other parameters.
    """
    changes: dict[str, object] = {"density": density}
    own: tuple[float, ...] | None = getattr(method, "densities", None)
    if own is not None:
        factor = density / (sum(own) / len(own))
        changes = {"densities": tuple(min(1.0, factor * each) for each in own)}
    return with_parameters(method, changes)


def merged(groups: Sequence[HeadGroup]) -> list[HeadGroup]:
    """The groups of a layer, those whose methods differ in density alone as one group with a density per head."""
    alike: dict[Method | None, list[HeadGroup]] = {}
    for group in groups:
        kind = None if group.method is None else without_density(group.method)
        alike.setdefault(kind, []).append(group)
    return [_as_one(members) for members in alike.values()]


def _as_one(groups: list[HeadGroup]) -> HeadGroup:
    first = groups[0]
    if len(groups) == 1 or first.method is None:
        return first
    densities = {head: share for group in groups for head, share in zip(group.heads, _shares(group), strict=True)}
    heads = tuple(sorted(densities))
    method = first.method.model_copy(update={"densities": tuple(densities[head] for head in heads)})
    return replace(first, method=method, heads=heads)


def _shares(group: HeadGroup) -> tuple[float | None, ...]:
    """The density of every head of a group."""
    assert group.method is not None
    own: tuple[float, ...] | None = getattr(group.method, "densities", None)
    return own if own is not None and len(own) > 1 else (group.method.requested_density,) * len(group.heads)
