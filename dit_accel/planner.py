"""Order and plan of every call: made anew, or the ones that the schedule lets it use again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.branches import choice_of_other_branch, deciding_rows, keep_choice, layout_of_rows, of_rows
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder, relative
from dit_accel.plan import BlockPlan
from dit_accel.report.records import CallRecord
from dit_accel.reuse import for_other_layers, order_for_all, overlap, plan_for_all, representative_heads
from dit_accel.rows import rows_of_order, rows_of_plan
from dit_accel.schedule import Schedule
from dit_accel.shard import TokenShard
from dit_accel.state import CallContext, RunState

# A head table may give every layer a dozen modes.
_STATIC_PLANS_KEPT = 32
QKV = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """The call that a plan is for: everything but its tensors.

    Args:
        method: decides order and blocks.
        layer: index of the attention layer.
        layout: token geometry.
        state: the forward pass.
        standing: the shared order in which tokens stand, and not in the raster. The order of `method` must be static,
            and becomes what takes them from there to that of the method. Default None: they stand in the raster.
        shard: whose tokens alone q holds; the method must be static. Default None: all.
        group: tells apart the groups of heads that keep things apart; one that is the same in all layers shares with
            all of them.
        representatives: heads that the plan is made for, each the mean of a run of heads, where the method looks at
            queries. Default None: every head.
    """

    method: Method
    layer: int
    layout: TokenLayout
    state: RunState
    standing: TokenOrder | None = None
    shard: TokenShard | None = None
    group: Hashable = None
    representatives: int | None = None

    def key(self, q: Tensor) -> tuple[Any, ...]:
        """What a plan that depends on q and k must agree in to serve this call; q `[B, H, N, D]`."""
        return (self.method, self.layout, q.shape[:2], self.standing)

    def static_key(self, q: Tensor) -> tuple[Any, ...]:
        """What a plan that depends on the layout alone must agree in; q `[B, H, N, D]`."""
        return (self.method, self.layout, q.device, self.standing, self.shard)


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

    def plan(self, request: PlanRequest, qkv: QKV, record: CallRecord) -> tuple[Planned, QKV]:
        """Order and plan, new or kept, and q, k, v `[B, H, N, D]` in that order; times go to `record`."""
        device, shard = qkv[0].device, request.shard
        held = request.method.held_plan(self.call(request, len(qkv[0]))) if request.method.holds_plans else None
        kept = self._kept(request, qkv[0]) if held is None else None
        if kept is None:
            # A static method looks at no query, so that keys may stand for those that are elsewhere.
            kept, ordered = self._make(request, qkv if shard is None else (qkv[1], *qkv[1:]), record, held)
            if shard is not None:
                kept, ordered = kept.of_tokens(shard.tokens(request.layout)), None
            if held is None:
                self._keep(request, qkv[0], kept, record)
            if ordered is not None:
                return kept, ordered
        if kept.order is not None:
            with record.timed("order", device):
                qkv = kept.order.apply(*qkv)
        return kept, qkv

    def search(self, request: PlanRequest, qkv: QKV, record: CallRecord) -> None:
        """Make the plan of a call that runs dense, for the steps that follow, unless the one that is kept will do."""
        if not request.method.is_static and self._kept(request, qkv[0]) is None:
            planned, _ = self._make(request, qkv, record)
            self._keep(request, qkv[0], planned, record)

    def _make(
        self, request: PlanRequest, qkv: QKV, record: CallRecord, held: BlockPlan | None = None
    ) -> tuple[Planned, QKV | None]:
        """A plan, new unless the method holds one, and q, k, v in its order where they had to be put so.

        (None: representatives stood for them.)
        """
        method, device, (batch, heads) = request.method, qkv[0].device, qkv[0].shape[:2]
        rows = deciding_rows(method, request.state, request.layout, batch)
        call = self.call(replace(request, layout=layout_of_rows(request.layout, rows)), batch)
        speakers = self._representatives(request, of_rows(qkv, rows), record)
        made, ordered = speakers[0].shape[:2], None
        with record.timed("order", device):
            order = method.order(*speakers, call)
            order = order if request.standing is None else relative(order, request.standing)
            order = None if order is None else order.to(device)
            if made[1] == heads:
                # All rows are moved, once, and those that decide are taken from them.
                order = order_for_all(order, made, (batch, heads))
                ordered = qkv if order is None else order.apply(*qkv)
                speakers = of_rows(ordered, rows)
            elif order is not None:
                speakers = order.apply(*speakers)
        with record.timed("select", device):
            (q, k, _), call.values = speakers, speakers[2]
            plan = choice_of_other_branch(method, q, call) if held is None else held
            if plan is None:
                plan = method.select(q, k, call)
                if rows is None:
                    keep_choice(method, q, call, plan)
            plan = plan_for_all(plan, made, (batch, heads))
            order = order if ordered is not None else order_for_all(order, made, (batch, heads))
            record.measures.update(call.measures)
            planned = Planned(order, plan.to(device), _density(plan, device, method.is_static))
        return planned, ordered

    @staticmethod
    def _representatives(request: PlanRequest, qkv: QKV, record: CallRecord) -> QKV:
        """The heads that plans are made for, `[B, g, N, D]`."""
        groups = request.representatives
        if groups in (None, qkv[0].shape[1]):
            return qkv
        with record.timed("select", qkv[0].device):
            q, k, v = (representative_heads(x, groups) for x in qkv)
        return q, k, v

    def _kept(self, request: PlanRequest, q: Tensor) -> Planned | None:
        if request.method.is_static:
            found = self._static.get(key := request.static_key(q))
            if found is not None:
                self._static.move_to_end(key)
            return found
        made, layer, step = self._made.get(self._slot(request)), request.layer, request.state.step
        if made is None or made.key != request.key(q) or not self.schedule.keeps(made.step, step):
            return None
        return made.planned if layer == made.layer else made.for_others

    def _keep(self, request: PlanRequest, q: Tensor, planned: Planned, record: CallRecord) -> None:
        if request.method.is_static:
            self._static[request.static_key(q)] = planned
            if len(self._static) > _STATIC_PLANS_KEPT:
                self._static.popitem(last=False)
            return
        layer, layers = request.layer, self.schedule.layer_group(request.layer)
        if layers is None and not self.schedule.keeps_plans:
            return
        slot, key = self._slot(request), request.key(q)
        old = self._made.get(slot)
        with record.timed("select", q.device):
            if old is not None and old.key == key and old.layer == layer and _comparable(old.planned, planned):
                record.measures["overlap"] = overlap(planned.plan, old.planned.plan)
            others = planned if layers is None else self._for_others(planned)
        self._made[slot] = _Made(request.state.step, layer, key, planned, others)

    def _for_others(self, planned: Planned) -> Planned:
        order, plan = for_other_layers(planned.order, planned.plan, self.schedule.layer_heads)
        if plan is planned.plan:
            return planned
        return Planned(order, plan, _density(plan, plan.indices.device, static=False))

    def _slot(self, request: PlanRequest) -> tuple[Any, ...]:
        """Where a plan is kept: per layer or group of layers, branch, and group of heads."""
        layers = self.schedule.layer_group(request.layer)
        return (request.layer if layers is None else layers, request.state.branch, request.group)

    def call(self, request: PlanRequest, rows: int) -> CallContext:
        """What a method is told about a call, with what it kept from earlier ones of as many batch rows.

        (A step cache may run one of two batched guidance branches; what was kept for both does not fit it.)
        """
        state, layer, common = request.state, request.layer, (request.group, rows)
        key = (state.branch, *common)
        memory = self._memory.setdefault((layer, *key), {})
        shared = self._memory.setdefault(("shared", *key), {})
        branches = self._memory.setdefault(("branches", layer, *common), {})
        return CallContext(
            request.layout, layer, state.step, state.noise, state.branch, memory, shared, self.seed, branches=branches
        )


def _density(plan: BlockPlan, device: torch.device, static: bool) -> float | Tensor:
    """Density of a plan; left on the device where reading it at every call would make the host wait."""
    return plan.density if device.type == "cpu" or static else plan.density_per_head().mean()


def _comparable(old: Planned, new: Planned) -> bool:
    """Whether the blocks of both plans hold the same tokens."""
    same = old.order is new.order or (old.order is not None and new.order is not None and new.order.is_shared)
    return same and old.plan.k_blocks.same_as(new.plan.k_blocks) and old.plan.q_blocks.same_as(new.plan.q_blocks)
