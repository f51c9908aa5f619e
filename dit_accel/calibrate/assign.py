"""From statistics to an assignment: what a budget means, which candidates may run together, and which layers count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from dit_accel.calibrate.run import Plan, check_seen
from dit_accel.calibrate.solve import Assignment, shared_cost, solve
from dit_accel.calibrate.statistics import Statistics
from dit_accel.errors import ConfigError
from dit_accel.estimate import token_grid
from dit_accel.families.base import Family
from dit_accel.hoisting import common_order
from dit_accel.layout import TokenLayout

_ROUNDING = 1e-5  # what dense attention differs by from itself by another kernel


class Budget(TypedDict, total=False):
    """One of the budgets of `assign`, by name."""

    max_error: float | None
    max_density: float | None
    max_time: float | None


@dataclass(frozen=True)
class Palette:
    """Candidates that an assignment may take from.

    Args:
        members: their indices.
        hoisted: whether they stand in one order, which is applied once per pass and costs no layer anything.
    """

    members: tuple[int, ...]
    hoisted: bool


def can_hoist(family: Family) -> bool:
    """Whether models of the family can take an order that all layers share once per pass."""
    return type(family).token_ports is not Family.token_ports


def palettes(plan: Plan, hoists: bool = True) -> tuple[Palette, ...]:
    """All candidates, and those of each order that could be shared, with "dense", which fits any.

    Args:
        plan: candidates and sizes.
        hoists: the family can put the tokens into an order that all layers share.
    """
    layout = TokenLayout(token_grid(plan.preset.model, plan.generation))
    methods = list(plan.candidates.values())
    of_order: dict[bytes, list[int]] = {}
    for index, method in enumerate(methods):
        order = common_order([method], layout) if hoists else None
        if order is not None:
            of_order.setdefault(order.numpy().tobytes(), []).append(index)
    dense = [index for index, method in enumerate(methods) if method.name == "dense"]
    shared = [Palette(tuple(sorted(members + dense)), hoisted=True) for members in of_order.values()]
    everything = Palette(tuple(range(len(methods))), hoisted=False)
    return (*shared, *([] if any(len(p.members) == len(methods) for p in shared) else [everything]))


def assign(
    held: Statistics,
    max_error: float | None = None,
    max_density: float | None = None,
    max_time: float | None = None,
    among: Sequence[Palette] = (),
    starts: tuple[int, ...] = (),
    weighted: bool = True,
) -> Assignment:
    """Solve for the calls that were seen.

    Layers and steps that always run dense take what most others take, so that they ask for no order of their own.

    Args:
        held: what was measured.
        max_error, max_density, max_time: the budget, one of them; see `solve`. Time is that of attention as a share of
            dense attention's.
        among: palettes; the best of their solutions is taken. Default: all candidates, in orders of their own.
        starts: first steps of the later ranges.
        weighted: let errors count, under `max_density` and `max_time`, for what they do to the picture, where that was
            seen: by probes, for layers and steps, and by candidates alone, for kinds of candidates.

    Raises:
        ConfigError: nothing was measured, because the schedule keeps every call dense; or see `solve`.
    """
    check_seen(held)
    if sum(budget is not None for budget in (max_error, max_density, max_time)) > 1:
        raise ConfigError("budget", "expected one of error, density and time, got several")
    if max_time is not None and not held.has_times:
        raise ConfigError("--max-time", "the statistics hold no times: candidates have not run alone")
    seen = held.calls > 0
    max_error = None if max_error is None else max(max_error, _ROUNDING)
    share = held.calls / held.calls.sum()
    weight = held.weight() if weighted else None
    effect = held.effect(share if weight is None else weight) if weighted else None
    if effect is not None and weight is None:
        weight = share
    terms = _Terms(held, seen, share[seen], None if weight is None else weight[seen], effect)
    among = among or (Palette(tuple(range(held.error.shape[-1])), hoisted=False),)
    tried: list[tuple[float, Assignment]] = []
    for palette in among:
        try:
            tried.append(terms.solve(palette, max_error, max_density, max_time))
        except ConfigError as refused:
            fault = refused
    if not tried:
        raise fault
    found = min(tried, key=lambda each: each[0])[1]
    choice = found.choice.flatten().mode().values.expand(held.error.shape[:3]).clone()
    choice[seen] = found.choice
    return replace(found, choice=choice, starts=starts)


@dataclass(frozen=True)
class _Terms:
    """What was measured, the calls seen, bool `[P, L]`, their shares in the means, and what errors count for.

    `weight`: of the calls seen; `effect`: of candidates, `[C]`.
    """

    held: Statistics
    seen: Tensor
    share: Tensor
    weight: Tensor | None
    effect: Tensor | None

    def solve(
        self, palette: Palette, max_error: float | None, max_density: float | None, max_time: float | None
    ) -> tuple[float, Assignment]:
        """The best solution from a palette, with candidates numbered as in `held`, and what it is judged by."""
        held, seen, members = self.held, self.seen, torch.tensor(palette.members)
        error, density = held.mean_error()[seen], held.mean_density()[seen]
        counts = error if self.effect is None or max_error is not None else error * self.effect
        heads, group = density, None
        if max_time is not None:
            heads, group = (time[seen] for time in held.mean_time(palette.hoisted))
        found = solve(
            counts[..., members],
            heads[..., members],
            max_error=max_error,
            max_cost=max_density if max_time is None else max_time,
            fixed=None if group is None else group[..., members],
            kinds=[held.kinds[index] for index in palette.members],
            share=self.share,
            weight=self.weight,
            option="--density" if max_time is None else "--max-time",
        )
        choice = members[found.choice]
        taken = choice.unsqueeze(-1)
        wrong = error.gather(-1, taken).sum((1, 2))
        change = None if self.weight is None else float(counts.gather(-1, taken).sum((1, 2)) @ self.weight)
        reached = float(wrong @ self.share) ** 0.5
        cost = float(density.gather(-1, taken).mean((1, 2)) @ self.share)
        time = _time(held, seen, choice, self.share, palette.hoisted) if held.has_times else None
        found = replace(found, choice=choice, error=reached, cost=cost, time=time, change=change)
        return cost if max_error is not None else (reached if change is None else change), found


def _time(held: Statistics, seen: Tensor, choice: Tensor, share: Tensor, hoisted: bool) -> float:
    """Predicted time of attention, as a share of dense attention's; choice int64 `[I, H]` of the calls seen."""
    heads, group = (time[seen] for time in held.mean_time(hoisted))
    alone = heads.gather(-1, choice.unsqueeze(-1)).mean((1, 2))
    return float((alone + shared_cost(group, choice, held.kinds)) @ share)
