"""Which method each layer, and each head of it, runs under."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.head_densities import merged, without_density
from dit_accel.head_table import HeadGroup, HeadTable
from dit_accel.methods.base import Method
from dit_accel.methods.registry import with_parameters
from dit_accel.reuse import check_representatives
from dit_accel.schedule import Schedule
from dit_accel.shard import HeadShard
from dit_accel.transfer import to_device


class LayerGroup(NamedTuple):
    """Heads of a layer that run under one method.

    Args:
        method: what they run under.
        heads: which, int64 `[H']`; None: all.
        key: tells groups apart in what is kept between calls; a group goes on at another density with what it kept.
        representatives: heads that plans are made for, each the mean of a run of heads; None: every head.
    """

    method: Method
    heads: Tensor | None
    key: Hashable = None
    representatives: int | None = None


Groups = Sequence[LayerGroup]


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
        self._heads: dict[tuple[int, int, HeadShard, torch.device], list[LayerGroup]] = {}

    def check_model(self, heads: Sequence[int | None]) -> None:
        """Refuse what is for another model, before it runs.

        Args:
            heads: attention heads of every layer; None: not known.

        Raises:
            ConfigError: parameters, representatives or a head table for another number of heads, an entry of the table
                that is no method, files that are not there.
        """
        table, groups = self._schedule.head_table, self._schedule.head_groups
        for method, count in zip(self._methods, heads, strict=True):
            if count is None:
                continue
            if table is not None:
                table.check_size(len(self._methods), count)
                continue
            check_representatives(count, groups or count)
            method.check_model(count if method.is_static else groups or count)
        for group in () if table is None else table.all_groups(self._methods):
            if group.method is not None:
                group.method.check_model(len(group.heads))

    def check_shares(self, heads: int, processes: int) -> None:
        """Refuse what cannot be divided among processes that hold equal shares of the heads, before a model is loaded.

        Args:
            heads: attention heads of every layer.
            processes: how many share them; a divisor of `heads`.

        Raises:
            ConfigError: as `groups` raises it for some process and step, or parameters that are not for its heads.
        """
        table, count = self._schedule.head_table, heads // processes
        for layer in range(len(self._methods)):
            for step in (0,) if table is None else (0, *table.starts):
                for first in range(0, heads, count):
                    for group in self.groups(layer, HeadShard(first, count, heads), torch.device("cpu"), step):
                        held = count if group.heads is None else len(group.heads)
                        group.method.check_model(group.representatives or held)

    def of_layer(self, layer: int) -> Method:
        """The method of a layer; heads of a table that name none run under it."""
        return self._methods[layer]

    def all(self) -> set[Method]:
        """Every method that some head of some layer runs under."""
        table = self._schedule.head_table
        return {*self._methods} if table is None else set(table.methods(self._methods))

    def moves_padding(self, layer: int, step: int) -> str | None:
        """The name of a method of a layer at a step that cannot stand padding among the video; None: all can."""
        table, method = self._schedule.head_table, self._methods[layer]
        found = [method] if table is None else [group.method for group in table.groups(layer, method, step)]
        return next((one.name for one in found if one is not None and not one.keeps_padding_last), None)

    def groups(self, layer: int, shard: HeadShard, device: torch.device, step: int = 0) -> Groups:
        """The methods of a layer at a step and which heads of the shard run under each, on `device`.

        Heads of a table whose methods differ in density alone are one group.

        Raises:
            ConfigError: the head table is for a model of another size.
        """
        table = self._schedule.head_table
        key = (0 if table is None else table.phase(step), layer, shard, device)
        if key not in self._heads:
            self._heads[key] = self._in_table(table, layer, shard, device, step) if table else self._alone(layer, shard)
        return self._heads[key]

    def _alone(self, layer: int, shard: HeadShard) -> list[LayerGroup]:
        """All heads of a shard under the method of the layer."""
        method, groups = self._methods[layer], self._schedule.head_groups
        if groups is None or method.is_static:
            return [LayerGroup(method.of_heads(shard), None)]
        check_representatives(shard.total, groups)
        speakers = shard.grouped(groups)
        return [LayerGroup(method.of_heads(speakers), None, representatives=speakers.count)]

    def _in_table(
        self, table: HeadTable, layer: int, shard: HeadShard, device: torch.device, step: int
    ) -> list[LayerGroup]:
        """The heads of a shard as the head table says."""
        table.check_size(len(self._methods), shard.total)
        groups = merged(table.groups(layer, self._methods[layer], step))
        held = (_of_shard(group, shard, device) for group in groups)
        return [group for group in held if group is not None]


def _of_shard(group: HeadGroup, shard: HeadShard, device: torch.device) -> LayerGroup | None:
    """The heads of a group that a shard holds, counted from its first; None: none, or they are skipped.

    What the method says head by head is for the heads of the group, of which those of a shard are neighbours.
    """
    heads = tuple(head - shard.first for head in group.heads if shard.first <= head < shard.first + shard.count)
    if group.method is None or not heads:
        return None
    before = sum(head < shard.first for head in group.heads)
    method = group.method.of_heads(HeadShard(before, len(heads), len(group.heads)))
    whole = len(heads) == shard.count
    index = None if whole else to_device(torch.tensor(heads), device)
    return LayerGroup(method, index, (without_density(method), None if whole else heads))


def method_of_layer(method: Method, schedule: Schedule, layer: int) -> Method:
    """The method with the parameters that the overrides of the schedule replace in a layer.

    Raises:
        ConfigError: an override that the method does not take.
    """
    changed = schedule.parameters_for(layer)
    return with_parameters(method, changed) if changed else method


def check_policy(method: Method, schedule: Schedule) -> None:
    """Refuse a schedule that does not go with `method`, whatever the model.

    Raises:
        ConfigError: an override that the method does not take, a plan for several layers whose heads have no union, or
            search steps for a method that says itself how long a plan lasts.
    """
    changes = {layer for override in schedule.overrides for bounds in override.layers for layer in bounds}
    methods = {method, *(method_of_layer(method, schedule, layer) for layer in changes)}
    if schedule.search_steps:
        table = schedule.head_table
        bases = [method_of_layer(method, schedule, layer) for layer in range(table.layer_count)] if table else []
        for each in methods if table is None else table.methods(bases):
            if each.holds_plans:
                raise ConfigError(
                    "schedule.search_steps",
                    f"method {each.name!r} with remainder 'history' makes plans every `period` steps: leave one out",
                )
    if schedule.layer_heads == "union":
        for start, end in schedule.layer_groups:
            for layer in {start, *(layer for layer in changes if start < layer < end)}:
                if method_of_layer(method, schedule, layer).orders_each_head:
                    raise ConfigError(
                        "schedule.layer_heads",
                        f"'union' needs one order for all heads, and method {method.name!r} orders each: use 'index'",
                    )
