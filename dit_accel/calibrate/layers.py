"""Which layers can do with the plan of an earlier one: measured, and solved by dynamic programming (arXiv 2602.00777).

Neighbouring layers often select the same blocks. A group of layers makes one plan, at its first layer; what that costs
the others is measured, and the fewest plans within a budget of error are found.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.calibrate.observer import Observer, Planned
from dit_accel.calibrate.statistics import Statistics
from dit_accel.engine import DenseCall
from dit_accel.errors import ConfigError
from dit_accel.methods.base import Method
from dit_accel.reuse import for_other_layers
from dit_accel.schedule import Schedule

_SLACK = 1e-6


class LayerObserver(Observer):
    """Measures one method under its own plan, and under those of the layers before: candidate d is d layers back.

    Candidates whose layer does not exist, or stays dense, have an infinite error.

    Args:
        method: makes plans that depend on q and k.
        reach: how many layers back.
        layer_heads: which plan other layers get, see `Schedule`.
        schedule, statistics, share, every, seed: as for `Observer`.

    Raises:
        ConfigError: a static method, whose plans all layers share anyway.
    """

    def __init__(
        self,
        method: Method,
        reach: int,
        layer_heads: Literal["union", "index"],
        schedule: Schedule,
        statistics: Statistics,
        share: float = 1.0,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        check_method(method)
        super().__init__([method], schedule, statistics, share, every, seed)
        self.reach, self.layer_heads = reach, layer_heads
        self._before: dict[tuple[str, str], dict[int, Planned]] = {}

    def _measure(self, seen: DenseCall, real: Tensor) -> tuple[Tensor, Tensor]:
        """Sums over heads, `[1, reach + 1]` each; the density is the mean."""
        method = self.candidates[0]
        # What a method keeps goes with the plan that left it: every candidate has a memory of its own.
        calls = [self._call(back, seen) for back in range(self.reach + 1)]
        own = self._plan(0, method, seen, calls[0])
        before = self._before.setdefault((seen.component, seen.state.branch), {})
        if seen.layer <= max(before, default=-1):
            before.clear()  # the next forward pass
        errors, densities = [], []
        for back, call in enumerate(calls):
            planned = own if back == 0 else before.get(seen.layer - back)
            if planned is None:
                errors.append(own[1].counts.new_tensor(math.inf, dtype=torch.float32))
                densities.append(torch.ones_like(errors[-1]))
                continue
            wrong, density = self._compare(method, seen, real, call, planned)
            errors.append(wrong.sum())
            densities.append(density.mean())
        before[seen.layer] = for_other_layers(*own, self.layer_heads)
        before.pop(seen.layer - self.reach, None)
        return torch.stack(errors)[None], torch.stack(densities)[None]


def check_method(method: Method) -> None:
    """Refuse a method whose plans do not depend on q and k.

    Raises:
        ConfigError: it is static.
    """
    if method.is_static:
        raise ConfigError("--layer-reuse", f"all layers share the plans of {method.name} already: it is static")


@dataclass(frozen=True)
class LayerGroups:
    """Which layers share a plan.

    Args:
        groups: half-open ranges of two or more layers, for `Schedule.layer_groups`.
        error: root of the mean over layers of the squared relative error, predicted.
        plans: plans made per step.
        layers: layers that run the method.
    """

    groups: tuple[tuple[int, int], ...]
    error: float
    plans: int
    layers: int


def solve_groups(error: Tensor, seen: Sequence[bool], max_error: float) -> LayerGroups:
    """The grouping with the fewest plans whose error keeps the budget; of those with as many, the most faithful.

    Args:
        error: squared relative error `[layers, reach + 1]` of a layer under the plan of the layer `d` before.
        seen: which layers run the method; the others stand alone and cost nothing.
        max_error: budget for the root of the mean over the layers seen of the squared relative error.

    Raises:
        ConfigError: not even a plan for every layer keeps the budget; the message says what that reaches.
    """
    layers, reach = error.shape[0], error.shape[1] - 1
    table, count = error.double().tolist(), max(1, sum(seen))
    # best[n][plans]: least error of the first n layers with so many plans, and where their last group begins.
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, 0)}]
    for end in range(1, layers + 1):
        found: dict[int, tuple[float, int]] = {}
        for start in range(max(0, end - reach - 1), end):
            if not all(seen[start:end]) and end - start > 1:
                continue
            paid = int(seen[start])
            added = sum(table[layer][layer - start] for layer in range(start, end)) if paid else 0.0
            for plans, (total, _) in best[start].items():
                if total + added < found.get(plans + paid, (math.inf, 0))[0]:
                    found[plans + paid] = (total + added, start)
        best.append(found)
    within = [p for p, (total, _) in best[layers].items() if total <= max_error**2 * count * (1 + _SLACK)]
    if not within:
        least = min(total for total, _ in best[layers].values())
        raise ConfigError(
            "--max-error", f"expected at least {math.sqrt(least / count):.4g}, a plan per layer, got {max_error:g}"
        )
    plans = min(within)
    total, groups, end, left = best[layers][plans][0], [], layers, plans
    while end:
        start = best[end][left][1]
        if end - start > 1:
            groups.append((start, end))
        left, end = left - int(seen[start]), start
    return LayerGroups(tuple(reversed(groups)), math.sqrt(total / count), plans, sum(seen))
