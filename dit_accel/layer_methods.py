"""Which method each layer, and each head of it, runs under."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.schedule import Schedule
from dit_accel.shard import HeadShard

Groups = Sequence[tuple[Method, Tensor | None]]
"""Methods and the heads that run under each, int64 `[H']`; None: all heads."""


class LayerMethods:
    """The method of every layer, with the overrides of the schedule, and of every head, with its head table.

    Args:
        method: what runs where the schedule says nothing else.
        schedule: gives overrides and head table.
        layers: number of attention layers.

    Raises:
        ConfigError: an override that the method does not take.
    """

    def __init__(self, method: Method, schedule: Schedule, layers: int) -> None:
        self._schedule = schedule
        self._methods = [method_of_layer(method, schedule, layer) for layer in range(layers)]
        self.are_dense = schedule.head_table is None and all(method.name == "dense" for method in self._methods)
        self._heads: dict[tuple[int, int, HeadShard, torch.device], list[tuple[Method, Tensor]]] = {}

    def of_layer(self, layer: int) -> Method:
        """The method of a layer; heads of a table that name none run under it."""
        return self._methods[layer]

    def all(self) -> set[Method]:
        """Every method that some head of some layer runs under."""
        table = self._schedule.head_table
        return {*self._methods} if table is None else set(table.methods(self._methods))

    def groups(self, layer: int, shard: HeadShard, device: torch.device, step: int = 0) -> Groups:
        """The methods of a layer at a step and which heads of the shard run under each, on `device`.

        Raises:
            ConfigError: the head table is for a model of another size.
        """
        table, method = self._schedule.head_table, self._methods[layer]
        if table is None:
            return [(method, None)]
        key = (table.phase(step), layer, shard, device)
        if key not in self._heads:
            table.check_size(len(self._methods), shard.total)
            mine = slice(shard.first, shard.first + shard.count)
            groups = table.slice(heads=mine).groups(layer, method, step) if shard.first < shard.total else ()
            self._heads[key] = [
                (group.method, torch.tensor(group.heads, device=device)) for group in groups if group.method is not None
            ]
        return self._heads[key]


def method_of_layer(method: Method, schedule: Schedule, layer: int) -> Method:
    """The method with the parameters that the overrides of the schedule replace in a layer.

    Raises:
        ConfigError: an override that the method does not take.
    """
    changed = schedule.parameters_for(layer)
    return method if not changed else get_method(method.name, **{**method.model_dump(exclude_unset=True), **changed})


def check_overrides(method: Method, schedule: Schedule) -> None:
    """Refuse overrides that `method` does not take, whatever the number of layers.

    Raises:
        ConfigError: unknown parameter, wrong type, value out of range.
    """
    for layer in {start for override in schedule.overrides for start, _ in override.layers}:
        method_of_layer(method, schedule, layer)
