"""The cheapest assignment of candidates to heads under a budget of error, or the most faithful one under one of cost.

A multiple-choice knapsack: every head takes one candidate, errors and costs add up. Per head only the candidates on
the lower convex hull of (cost, error) matter; walking the hulls of all heads in the order of error saved per cost is
optimal for the relaxed problem at every step, and at most one step away from the best whole assignment.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from dit_accel.errors import ConfigError

_SLACK = 1e-6  # costs may come from fp32


@dataclass(frozen=True)
class Assignment:
    """Which candidate every head takes.

    Args:
        choice: int64 `[layers, heads]`.
        error: root of the mean over layers of the squared relative error, predicted.
        cost: mean over all heads, predicted.
        time: share of dense attention's time, predicted; None where it was not measured.
    """

    choice: Tensor
    error: float
    cost: float
    time: float | None = None


@dataclass(frozen=True)
class _Edge:
    gain: float
    head: int
    to: int
    saved: float
    paid: float


def solve(
    error: Tensor,
    cost: Tensor,
    *,
    max_error: float | None = None,
    max_cost: float | None = None,
    option: str = "--density",
) -> Assignment:
    """Choose a candidate for every head.

    Args:
        error: squared relative error, `[layers, heads, candidates]`; sums over heads give that of the layer.
        cost: the same shape, for example densities.
        max_error: budget for the root of the mean over layers of the squared relative error. The cheapest assignment
            within it is taken.
        max_cost: budget for the mean cost over all heads. The most faithful assignment within it is taken.
        option: how the user gives the budget of cost, for messages.

    Raises:
        ConfigError: not exactly one budget, or no assignment keeps it; the message says what the best one reaches.
    """
    if (max_error is None) == (max_cost is None):
        raise ConfigError("budget", "expected either a largest error or a largest density, got both or neither")
    layers, heads, _ = error.shape
    flat_error, flat_cost = error.double().flatten(0, 1), cost.double().flatten(0, 1)
    hulls = [_hull(e, c) for e, c in zip(flat_error.tolist(), flat_cost.tolist(), strict=True)]
    choice = [hull[0] for hull in hulls]
    edges = sorted(_edges(hulls, flat_error, flat_cost), key=lambda edge: -edge.gain)
    total_error, total_cost = _totals(flat_error, flat_cost, choice)
    stuck: set[int] = set()
    for edge in edges:
        if max_error is not None and total_error <= max_error**2 * layers * (1 + _SLACK):
            break
        # A head whose next step is too dear stays; cheaper steps of others may still fit.
        over = max_cost is not None and total_cost + edge.paid > max_cost * layers * heads * (1 + _SLACK)
        if over or edge.head in stuck:
            stuck.add(edge.head)
            continue
        choice[edge.head] = edge.to
        total_error, total_cost = total_error - edge.saved, total_cost + edge.paid
    total_error, total_cost = _totals(flat_error, flat_cost, choice)
    reached = Assignment(
        torch.tensor(choice).view(layers, heads), (total_error / layers) ** 0.5, total_cost / (layers * heads)
    )
    _check(reached, max_error, max_cost, option)
    return reached


def _check(reached: Assignment, max_error: float | None, max_cost: float | None, option: str) -> None:
    if max_error is not None and reached.error > max_error * (1 + _SLACK):
        raise ConfigError(
            "--max-error", f"expected at least {reached.error:.4g}, which the best candidates reach, got {max_error:g}"
        )
    if max_cost is not None and reached.cost > max_cost * (1 + _SLACK):
        raise ConfigError(
            option, f"expected at least {reached.cost:.4g}, which the cheapest candidates need, got {max_cost:g}"
        )


def _totals(error: Tensor, cost: Tensor, choice: list[int]) -> tuple[float, float]:
    index = torch.tensor(choice).unsqueeze(-1)
    return float(error.gather(-1, index).sum()), float(cost.gather(-1, index).sum())


def _hull(errors: list[float], costs: list[float]) -> list[int]:
    """Candidates on the lower convex hull of (cost, error), by rising cost and falling error."""
    hull: list[int] = []
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], errors[i])):
        if hull and errors[index] >= errors[hull[-1]]:
            continue  # dearer and no better
        while len(hull) >= 2 and _slope(hull[-2], hull[-1], errors, costs) <= _slope(hull[-1], index, errors, costs):
            hull.pop()
        hull.append(index)
    return hull


def _slope(first: int, second: int, errors: list[float], costs: list[float]) -> float:
    """Error saved per cost from one candidate to a dearer one."""
    return (errors[first] - errors[second]) / max(costs[second] - costs[first], 1e-12)


def _edges(hulls: list[list[int]], error: Tensor, cost: Tensor) -> list[_Edge]:
    edges = []
    for head, hull in enumerate(hulls):
        for here, there in pairwise(hull):
            saved = float(error[head, here] - error[head, there])
            paid = float(cost[head, there] - cost[head, here])
            edges.append(_Edge(saved / max(paid, 1e-12), head, there, saved, paid))
    return edges
