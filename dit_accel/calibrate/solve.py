"""The cheapest assignment of candidates to heads under a budget of error, or the most faithful one under one of cost.

An item is a layer in a range of steps. Candidates of one kind run in one call; kinds that share a layer cost extra.
What the heads of an item may take together are its options: those of one kind, of two kinds, or any, each a walk along
the heads' hulls. Items and options are a multiple-choice knapsack: the options on the lower convex hull of (cost,
error) are walked over all items in the order of error saved per cost, which is at most one step of one item away from
the optimum. Then single items change as long as that helps. Every uniform assignment is a start of its own, so none of
them is better by the same figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor

from dit_accel.errors import ConfigError

_SLACK = 1e-6  # costs may come from fp32


@dataclass(frozen=True)
class Assignment:
    """Which candidate every head takes.

    Args:
        choice: int64 `[layers, heads]`, or `[ranges, layers, heads]` where ranges of steps differ.
        error: root of the mean over calls of the squared relative error of a layer, predicted.
        cost: mean over all heads, predicted.
        time: share of dense attention's time, predicted; None where it was not measured.
        change: mean squared change of the picture, predicted from probes; None where none were made.
        starts: the first steps of the later ranges.
    """

    choice: Tensor
    error: float
    cost: float
    time: float | None = None
    change: float | None = None
    starts: tuple[int, ...] = ()


@dataclass(frozen=True)
class _Options:
    """What items may take: the item of each option `[K]`, its heads' candidates `[K, H]`, error and cost `[K]`.

    Sorted by item, and within an item by rising cost and falling error.
    """

    item: Tensor
    choice: Tensor
    error: Tensor
    cost: Tensor


def solve(
    error: Tensor,
    cost: Tensor,
    *,
    max_error: float | None = None,
    max_cost: float | None = None,
    fixed: Tensor | None = None,
    kinds: Sequence[int] | None = None,
    share: Tensor | None = None,
    weight: Tensor | None = None,
    option: str = "--density",
) -> Assignment:
    """Choose a candidate for every head of every item.

    Args:
        error: squared relative error, `[items, heads, candidates]`; sums over heads give that of the layer.
        cost: the same shape, for example densities.
        max_error: budget for the root of the mean over items of the squared relative error. The cheapest assignment
            within it is taken.
        max_cost: budget for the mean cost over all heads. The most faithful assignment within it is taken.
        fixed: what an item pays for every kind that only some of its heads take, `[items, candidates]`, alike for all
            candidates of a kind. Default: nothing; every head then takes what is best for it.
        kinds: the kind of each candidate. Default: each is one of its own.
        share: share of each item in the means, `[items]`, sums to 1. Default: the same for all.
        weight: what the squared error of an item counts for under `max_cost`, `[items]`. Default: its share.
        option: how the user gives the budget of cost, for messages.

    Raises:
        ConfigError: not exactly one budget, or no assignment keeps it; the message says what the best one reaches.
    """
    if (max_error is None) == (max_cost is None):
        raise ConfigError("budget", "expected either a largest error or a largest density, got both or neither")
    items, _, candidates = error.shape
    error, cost = error.double(), cost.double()
    share = torch.full((items,), 1 / items, dtype=torch.float64) if share is None else share.double()
    weight = share if weight is None or max_cost is None else weight.double()
    paid = None if fixed is None else fixed.double() * share[:, None]
    kinds = tuple(range(candidates)) if kinds is None else tuple(kinds)
    options = _options(error * weight[:, None, None], cost.mul(share[:, None, None]) / cost.shape[1], paid, kinds)
    limit = max_cost if max_cost is not None else (max_error or 0.0) ** 2
    value, spent = (options.error, options.cost) if max_cost is not None else (options.cost, options.error)
    starts = [_walk(options, items, max_error, max_cost), *_uniform(options, items, candidates)]
    within = [start for start in starts if float(spent[start].sum()) <= limit * (1 + _SLACK)]
    improved = [_improve(value, spent, options.item, start, limit * (1 + _SLACK)) for start in within]
    chosen = min(improved, key=lambda start: float(value[start].sum()), default=starts[0])
    choice = options.choice[chosen]
    taken = error.gather(-1, choice.unsqueeze(-1)).sum((1, 2))
    found = Assignment(choice, float((taken * share).sum()) ** 0.5, float(options.cost[chosen].sum()))
    _check(found, max_error, max_cost, option)
    return found


def _check(reached: Assignment, max_error: float | None, max_cost: float | None, option: str) -> None:
    if max_error is not None and reached.error > max_error * (1 + _SLACK):
        raise ConfigError(
            "--max-error", f"expected at least {reached.error:.4g}, which the best candidates reach, got {max_error:g}"
        )
    if max_cost is not None and reached.cost > max_cost * (1 + _SLACK):
        raise ConfigError(
            option, f"expected at least {reached.cost:.4g}, which the cheapest candidates need, got {max_cost:g}"
        )


def _options(error: Tensor, cost: Tensor, fixed: Tensor | None, kinds: tuple[int, ...]) -> _Options:
    """The options of all items that no other option of the item beats, from errors and costs `[I, H, C]`."""
    items, heads, candidates = error.shape
    rows = torch.arange(items)
    uniform = torch.arange(candidates).repeat_interleave(heads).view(candidates, heads)
    found = [(rows.repeat_interleave(candidates), uniform.repeat(items, 1))]
    for members in _palettes(kinds, fixed is None or heads == 1):
        index = torch.tensor(members)
        each = [index[_per_head(error[i][:, index], cost[i][:, index])] for i in range(items)]
        found.append((torch.repeat_interleave(rows, torch.tensor([len(c) for c in each])), torch.cat(each)))
    item, choice = torch.cat([i for i, _ in found]), torch.cat([c for _, c in found])
    chosen = choice.unsqueeze(-1)
    wrong = error[item].gather(-1, chosen).sum((1, 2))
    paid = cost[item].gather(-1, chosen).sum((1, 2))
    if fixed is not None:
        paid = paid + shared_cost(fixed[item], choice, kinds)
    return _undominated(_Options(item, choice, wrong, paid), items)


def _palettes(kinds: tuple[int, ...], any_mixture: bool) -> list[list[int]]:
    """Candidates that the heads of an item may take together: of each kind, of each two, and all of them."""
    different = list(dict.fromkeys(kinds))
    subsets = [] if any_mixture else [{one} for one in different] + [{*pair} for pair in combinations(different, 2)]
    members = [[index for index, kind in enumerate(kinds) if kind in subset] for subset in subsets]
    every = list(range(len(kinds)))
    return [each for each in members if len(each) > 1 and each != every] + [every]


def shared_cost(fixed: Tensor, choice: Tensor, kinds: Sequence[int]) -> Tensor:
    """What items pay for the kinds that share them, `[K]`; none where all heads take one kind.

    Args:
        fixed: for every candidate, alike within a kind, `[K, C]`.
        choice: the candidate of each head, int64 `[K, H]`.
        kinds: the kind of each candidate.
    """
    lead = torch.tensor([list(kinds).index(kind) for kind in kinds])
    used = torch.zeros(fixed.shape, dtype=torch.bool).scatter_(1, lead[choice], True)
    return torch.where(used.sum(-1) > 1, (fixed * used).sum(-1), 0.0)


def _per_head(error: Tensor, cost: Tensor) -> Tensor:
    """Options of one item whose heads choose alone, int64 `[n, H]`, from `[H, C]`: the walk along the heads' hulls."""
    hulls = [_hull(e, c) for e, c in zip(error.tolist(), cost.tolist(), strict=True)]
    edges = []
    for head, hull in enumerate(hulls):
        for here, there in pairwise(hull):
            saved, paid = float(error[head, here] - error[head, there]), float(cost[head, there] - cost[head, here])
            edges.append((saved / max(paid, 1e-12), head, there))
    choice = [hull[0] for hull in hulls]
    found = [choice.copy()]
    for _, head, there in sorted(edges, key=lambda edge: -edge[0]):
        choice[head] = there
        found.append(choice.copy())
    return torch.tensor(found)


def _undominated(options: _Options, items: int) -> _Options:
    """Options such that no other of the item is both cheaper and more faithful; uniform ones all stay."""
    kept = []
    for item in range(items):
        mine = (options.item == item).nonzero().flatten()
        order = mine[torch.argsort(options.error[mine], stable=True)]
        order = order[torch.argsort(options.cost[order], stable=True)]
        least = options.error[order].cummin(0).values
        better = torch.cat([torch.ones(1, dtype=torch.bool), options.error[order][1:] < least[:-1]])
        alone = (options.choice[order] == options.choice[order][:, :1]).all(-1)
        kept.append(order[better | alone])
    index = torch.cat(kept)
    return _Options(options.item[index], options.choice[index], options.error[index], options.cost[index])


def _walk(options: _Options, items: int, max_error: float | None, max_cost: float | None) -> Tensor:
    """The options chosen by the walk along the hulls of all items, int64 `[items]`."""
    error, cost = options.error.tolist(), options.cost.tolist()
    members: list[list[int]] = [[] for _ in range(items)]
    for index, item in enumerate(options.item.tolist()):
        members[item].append(index)
    hulls = [[m[i] for i in _hull([error[n] for n in m], [cost[n] for n in m])] for m in members]
    edges = [(item, here, there) for item, hull in enumerate(hulls) for here, there in pairwise(hull)]
    edges.sort(key=lambda edge: -_slope(edge[1], edge[2], error, cost))
    chosen = [hull[0] for hull in hulls]
    wrong, paid = sum(error[n] for n in chosen), sum(cost[n] for n in chosen)
    stuck: set[int] = set()
    for item, here, there in edges:
        if max_error is not None and wrong <= max_error**2 * (1 + _SLACK):
            break
        # An item whose next step is too dear stays; cheaper steps of others may still fit.
        if item in stuck or (max_cost is not None and paid + cost[there] - cost[here] > max_cost * (1 + _SLACK)):
            stuck.add(item)
            continue
        chosen[item] = there
        wrong, paid = wrong + error[there] - error[here], paid + cost[there] - cost[here]
    return torch.tensor(chosen)


def _uniform(options: _Options, items: int, candidates: int) -> list[Tensor]:
    """For each candidate, the options in which all heads of all items take it, int64 `[items]`."""
    alone = (options.choice == options.choice[:, :1]).all(-1)
    found = []
    for candidate in range(candidates):
        index = (alone & (options.choice[:, 0] == candidate)).nonzero().flatten()
        first = torch.zeros(items, dtype=torch.int64).scatter_(0, options.item[index], index)  # any of equal ones
        found.append(first)
    return found


def _improve(value: Tensor, spent: Tensor, item: Tensor, chosen: Tensor, limit: float) -> Tensor:
    """Change the item that lowers `value` most while `spent` keeps the limit, until none does."""
    chosen, least = chosen.clone(), 1e-12 * float(value.max())  # what rounding may feign
    while True:
        gain = value - value[chosen][item]
        gain = gain.masked_fill(spent - spent[chosen][item] > limit - spent[chosen].sum(), 0.0)
        best = int(gain.argmin())
        if float(gain[best]) >= -least:
            return chosen
        chosen[item[best]] = best


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
