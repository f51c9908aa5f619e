"""Measures candidates on the queries, keys and values of a model that runs dense; keeps sums, never tensors."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dit_accel.calibrate.statistics import Statistics
from dit_accel.engine import DenseCall
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder, permute
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.rows import rows_of_plan
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext

_STATIC_KEPT = 64
Planned = tuple[TokenOrder | None, BlockPlan]
"""Order (None: raster) and plan of a call."""


class Observer:
    """Adds every call that the schedule would not keep dense to `statistics`.

    Args:
        candidates: the methods to measure.
        schedule: whose dense steps and layers are left out.
        statistics: the sums to add to.
        share: share of the query blocks that is computed per candidate and call, drawn anew each time. 1: all.
        every: only every n-th step.
        seed: of the draw.
        starts: first steps of the later ranges of steps that are kept apart.
    """

    def __init__(
        self,
        candidates: Sequence[Method],
        schedule: Schedule,
        statistics: Statistics,
        share: float = 1.0,
        every: int = 1,
        seed: int = 0,
        starts: Sequence[int] = (),
    ) -> None:
        self.candidates, self.schedule, self.statistics = candidates, schedule, statistics
        self.share, self.every, self.starts = share, every, starts
        self._generator = torch.Generator().manual_seed(seed)
        self._memory: dict[tuple[Any, ...], dict[str, Any]] = {}
        self._generation = -1
        self._static: OrderedDict[tuple[int, TokenLayout], Planned] = OrderedDict()

    @torch.no_grad()
    def __call__(self, seen: DenseCall) -> None:
        """Measure all candidates on one call."""
        state, layout = seen.state, seen.layout
        if state.generation != self._generation:
            self._memory.clear()
            self._generation = state.generation
        is_dense = self.schedule.dense_reason(seen.layer, state.step, state.noise, layout.tokens) is not None
        if is_dense or state.step % self.every:
            return
        lengths = layout.valid or (layout.tokens,) * seen.q.shape[0]
        real = torch.arange(layout.tokens) < torch.tensor(lengths).unsqueeze(-1)
        real = real.to(seen.out.device)[:, None, :]
        whole = seen.out.float().square().sum(-1).masked_fill(~real, 0).sum().clamp(min=1e-30)
        wrong, density = self._measure(seen, real)
        sums, layer, at = self.statistics, seen.layer, bisect_right(self.starts, state.step)
        sums.error[at, layer] += (wrong / whole).double().cpu()
        sums.density[at, layer] += density.double().cpu()
        sums.calls[at, layer] += 1

    def _measure(self, seen: DenseCall, real: Tensor) -> tuple[Tensor, Tensor]:
        """Squared errors and densities of one call, `[H, candidates]` each.

        `real`: which rows count, bool `[B, 1, N]`.
        """
        errors, densities = [], []
        for index, method in enumerate(self.candidates):
            call = self._call(index, seen)
            wrong, density = self._compare(method, seen, real, call, self._plan(index, method, seen, call))
            errors.append(wrong)
            densities.append(density.expand(wrong.shape))
        return torch.stack(errors, -1), torch.stack(densities, -1)

    def _compare(
        self, method: Method, seen: DenseCall, real: Tensor, call: CallContext, planned: Planned
    ) -> tuple[Tensor, Tensor]:
        """Squared error of every head, from the blocks drawn to all rows, `[H]`; density of every head `[H or 1]`."""
        order, plan = planned
        q, k, v = (seen.q, seen.k, seen.v) if order is None else order.apply(seen.q, seen.k, seen.v)
        # What happens to the rows in order happens to the dense output, and to the flag that says which rows count.
        out = seen.out if order is None else permute(seen.out, order.query)
        counted = real.expand(-1, q.shape[1], -1)
        counted = counted if order is None else permute(counted, order.query)
        part, tokens = plan, torch.arange(plan.q_blocks.tokens)
        if self.share < 1 and not method.completes:  # such a method needs all rows after the kernel
            part, tokens = take_query_blocks(plan, self._draw(plan.q_blocks))
        tokens = tokens.to(q.device)
        computed = method.compute(q.index_select(2, tokens), k, v, part, call)
        difference = (computed.float() - out.index_select(2, tokens).float()).square().sum(-1)
        wrong = difference.masked_fill(~counted.index_select(2, tokens), 0).sum((0, 2))
        density = plan.density_per_head().float().mean(0) + call.extra_density
        return wrong * (plan.q_blocks.tokens / len(tokens)), density

    def _call(self, index: int, seen: DenseCall) -> CallContext:
        """The call as the engine would describe it to a candidate, with what the candidate keeps over steps."""
        state, key = seen.state, (index, seen.component)
        own = [(*key, state.branch, seen.layer), (*key, state.branch), (*key, seen.layer)]
        memory, shared, branches = (self._memory.setdefault(each, {}) for each in own)
        call = CallContext(seen.layout, seen.layer, state.step, state.noise, state.branch, memory, shared)
        call.branches = branches
        return call

    def _plan(self, index: int, method: Method, seen: DenseCall, call: CallContext) -> Planned:
        """Order and plan on the device; those of a static method are kept."""
        kept = self._static.get((index, seen.layout)) if method.is_static else None
        if kept is not None:
            return kept
        order, plan = method.plan(seen.layout, seen.q, seen.k, seen.v, call)
        planned = (None if order is None else order.to(seen.q.device), plan.to(seen.q.device))
        if method.is_static:
            self._static[index, seen.layout] = planned
            if len(self._static) > _STATIC_KEPT:
                self._static.popitem(last=False)
        return planned

    def _draw(self, blocks: Blocking) -> Tensor:
        """Blocks to compute, ascending int64; all of them when `share` is 1."""
        count = max(1, round(self.share * blocks.count))
        return torch.randperm(blocks.count, generator=self._generator)[:count].sort().values


def take_query_blocks(plan: BlockPlan, blocks: Tensor) -> tuple[BlockPlan, Tensor]:
    """The plan of some query blocks alone, and the tokens in them.

    Args:
        plan: of all queries.
        blocks: ascending indices of query blocks, int64 on the CPU.

    Returns:
        A plan whose queries are those tokens, in their order, and all keys; int64 token indices on the CPU.
    """
    chosen = torch.zeros(plan.q_blocks.count, dtype=torch.bool)
    chosen[blocks] = True
    tokens = torch.repeat_interleave(chosen, plan.q_blocks.lengths).nonzero().flatten()
    return rows_of_plan(plan, tokens), tokens
