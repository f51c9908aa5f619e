"""Order and plan of every call: made anew, or the ones that the schedule lets it use again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.branches import choice_of_other_branch, deciding_rows, keep_choice, layout_of_rows
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder, relative
from dit_accel.plan import BlockPlan
from dit_accel.report import CallRecord
from dit_accel.reuse import for_all_heads, for_all_rows, for_other_layers, overlap, representative_heads
from dit_accel.rows import rows_of_order, rows_of_plan
from dit_accel.schedule import Schedule
from dit_accel.shard import TokenShard
from dit_accel.state import CallContext, RunState

# A head table may give every layer a dozen modes.
_STATIC_PLANS_KEPT = 32
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Planned:
    """Order (None: raster) and plan of a call, and the density of the plan (a tensor where reading it would wait)."""

    order: TokenOrder | None
    plan: BlockPlan
    density: float | Tensor

    def of_tokens(self, tokens: Tensor) -> Planned:
        """What some query tokens need of it, ascending in the raster; the density stays that of the whole call."""
        order, at = (None, tokens) if self.order is None else rows_of_order(self.order, tokens)
        return Planned(order, rows_of_plan(self.plan, at), self.density)


@dataclass(frozen=True)
class _Made:
    """A plan that depends on q and k: when and where it was made, from what, and what other layers use of it."""

    step: int
    layer: int
    key: tuple[Any, ...]
    planned: Planned
    for_others: Planned


class Planner:
    """Makes the order and plan of each call of one transformer and keeps those that may be used again.

    Plans of static methods are kept for good and shared by all calls with the same layout. Others are kept per layer,
    or per group of layers, and guidance branch, as long as the schedule says, and forgotten by `reset`.

    Args:
        schedule: says what may be used again.
        seed: seed for methods that draw random numbers.
    """

    def __init__(self, schedule: Schedule, seed: int = 0) -> None:
        self.schedule, self.seed = schedule, seed
        self._memory: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._made: dict[tuple[Any, ...], _Made] = {}
        self._static: OrderedDict[tuple[Any, ...], Planned] = OrderedDict()

    def reset(self) -> None:
        """Forget what depends on q and k: plans, and what methods keep (centroids, statistics)."""
        self._memory.clear()
        self._made.clear()

    def plan(
        self,
        method: Method,
        layer: int,
        layout: TokenLayout,
        state: RunState,
        qkv: QKV,
        record: CallRecord,
        standing: TokenOrder | None = None,
        shard: TokenShard | None = None,
        group: Hashable = None,
    ) -> tuple[Planned, QKV]:
        """Order and plan, new or kept, and q, k, v `[B, H, N, D]` in that order; times go to `record`.

        Where tokens stand in the shared order `standing` and not in the raster, the order of `method` must be static,
        and it becomes what takes them from there to that of the method. Where q holds the tokens of `shard` alone, the
        method must be static, and the plan is that of those tokens. Groups of heads that keep things apart have a
        `group` each.
        """
        device = qkv[0].device
        kept = self._kept(method, layer, layout, state, qkv[0], standing, shard, group)
        if kept is None:
            # A static method looks at no query, so that keys may stand for those that are elsewhere.
            whole = qkv if shard is None else (qkv[1], *qkv[1:])
            kept, ordered = self._make(method, layer, layout, state, whole, record, standing, group)
            if shard is not None:
                kept, ordered = kept.of_tokens(shard.tokens(layout)), None
            self._keep(method, layer, layout, state, qkv[0], kept, record, standing, shard, group)
            if ordered is not None:
                return kept, ordered
        if kept.order is not None:
            with record.timed("order", device):
                qkv = kept.order.apply(*qkv)
        return kept, qkv

    def search(
        self,
        method: Method,
        layer: int,
        layout: TokenLayout,
        state: RunState,
        qkv: QKV,
        record: CallRecord,
        standing: TokenOrder | None = None,
        group: Hashable = None,
    ) -> None:
        """Make the plan of a call that runs dense, for the steps that follow, unless the one that is kept will do."""
        if not method.is_static and self._kept(method, layer, layout, state, qkv[0], standing, group=group) is None:
            planned, _ = self._make(method, layer, layout, state, qkv, record, standing, group)
            self._keep(method, layer, layout, state, qkv[0], planned, record, standing, group=group)

    def _make(
        self,
        method: Method,
        layer: int,
        layout: TokenLayout,
        state: RunState,
        qkv: QKV,
        record: CallRecord,
        standing: TokenOrder | None,
        group: Hashable,
    ) -> tuple[Planned, QKV | None]:
        """A new plan, and q, k, v in its order where they had to be put so (None: representatives stood for them)."""
        device, (batch, heads), groups = qkv[0].device, qkv[0].shape[:2], self.schedule.head_groups
        rows = deciding_rows(method, state, layout, batch)
        call = self.call(layer, layout_of_rows(layout, rows), state, batch, group)
        q, k, v = qkv if rows is None else (x[rows] for x in qkv)
        if groups not in (None, heads) and not method.is_static:
            with record.timed("select", device):
                q, k, v = (representative_heads(x, groups) for x in (q, k, v))
        with record.timed("order", device):
            order = method.order(q, k, v, call)
            order = order if standing is None else relative(order, standing)
            order = None if order is None else order.to(device)
            q, k, v = (q, k, v) if order is None else order.apply(q, k, v)
        with record.timed("select", device):
            call.values = v
            plan = choice_of_other_branch(method, q, call)
            if plan is None:
                plan = method.select(q, k, call)
                if rows is None:
                    keep_choice(method, q, call, plan)
            if q.shape[1] != heads:
                order, plan = for_all_heads(order, plan, heads)
            if len(q) != batch:
                order, plan = for_all_rows(order, plan, batch)
            record.measures.update(call.measures)
            planned = Planned(order, plan.to(device), _density(plan, device, method.is_static))
        return planned, (q, k, v) if q.shape[:2] == (batch, heads) else None

    def _kept(
        self,
        method: Method,
        layer: int,
        layout: TokenLayout,
        state: RunState,
        q: Tensor,
        standing: TokenOrder | None = None,
        shard: TokenShard | None = None,
        group: Hashable = None,
    ) -> Planned | None:
        if method.is_static:
            found = self._static.get((method, layout, q.device, standing, shard))
            if found is not None:
                self._static.move_to_end((method, layout, q.device, standing, shard))
            return found
        made = self._made.get(self._slot(layer, state, group))
        if (
            made is None
            or made.key != (method, layout, q.shape[:2], standing)
            or not self.schedule.keeps(made.step, state.step)
        ):
            return None
        return made.planned if layer == made.layer else made.for_others

    def _keep(
        self,
        method: Method,
        layer: int,
        layout: TokenLayout,
        state: RunState,
        q: Tensor,
        planned: Planned,
        record: CallRecord,
        standing: TokenOrder | None = None,
        shard: TokenShard | None = None,
        group: Hashable = None,
    ) -> None:
        if method.is_static:
            self._static[method, layout, q.device, standing, shard] = planned
            if len(self._static) > _STATIC_PLANS_KEPT:
                self._static.popitem(last=False)
            return
        layers = self.schedule.layer_group(layer)
        if layers is None and not self.schedule.keeps_plans:
            return
        slot, key = self._slot(layer, state, group), (method, layout, q.shape[:2], standing)
        old = self._made.get(slot)
        with record.timed("select", q.device):
            if old is not None and old.key == key and old.layer == layer and _comparable(old.planned, planned):
                record.measures["overlap"] = overlap(planned.plan, old.planned.plan)
            others = planned if layers is None else self._for_others(planned)
        self._made[slot] = _Made(state.step, layer, key, planned, others)

    def _for_others(self, planned: Planned) -> Planned:
        order, plan = for_other_layers(planned.order, planned.plan, self.schedule.layer_heads)
        if plan is planned.plan:
            return planned
        return Planned(order, plan, _density(plan, plan.indices.device, static=False))

    def _slot(self, layer: int, state: RunState, group: Hashable) -> tuple[Any, ...]:
        """Where a plan is kept: per layer or group of layers, branch, and group of heads."""
        layers = self.schedule.layer_group(layer)
        return (layer if layers is None else layers, state.branch, group)

    def call(self, layer: int, layout: TokenLayout, state: RunState, rows: int, group: Hashable = None) -> CallContext:
        """What a method is told about a call of a layer, with what it kept from earlier ones of as many batch rows.

        (A step cache may run one of two batched guidance branches; what was kept for both does not fit it.) Groups of
        heads keep apart what they remember; one that is the same in all layers shares with all of them.
        """
        common = (group, rows)
        key = (state.branch, *common)
        memory = self._memory.setdefault((layer, *key), {})
        shared = self._memory.setdefault(("shared", *key), {})
        branches = self._memory.setdefault(("branches", layer, *common), {})
        return CallContext(
            layout, layer, state.step, state.noise, state.branch, memory, shared, self.seed, branches=branches
        )


def _density(plan: BlockPlan, device: torch.device, static: bool) -> float | Tensor:
    """Density of a plan; left on the device where reading it at every call would make the host wait."""
    return plan.density if device.type == "cpu" or static else plan.density_per_head().mean()


def _comparable(old: Planned, new: Planned) -> bool:
    """Whether the blocks of both plans hold the same tokens."""
    same = old.order is new.order or (old.order is not None and new.order is not None and new.order.is_shared)
    return same and old.plan.k_blocks.same_as(new.plan.k_blocks) and old.plan.q_blocks.same_as(new.plan.q_blocks)
