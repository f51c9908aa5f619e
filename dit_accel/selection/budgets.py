"""How many of the ranked key blocks are kept: fixed top-k, top-p, a threshold, and classes of heads.

A budget sees candidates ranked from best to worst along the last axis and returns how many of them to keep.
Axis legend: `[...]` leading axes (batch, heads, rows), L candidates of one ranking.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.kernels.ranking import Ranking, rank
from dit_accel.transfer import to_device
from dit_accel.widest import widened, widest

Rounding = Literal["round", "floor", "ceil", "plus_one"]
Share = float | Tensor

# Keeps 0.3 * 10 from counting as 3.0000000004 when it is rounded up.
_SLACK = 1e-6


@dataclass(frozen=True, eq=False)
class Ranked:
    """Candidates and their ranking: those forced first, those that must not be chosen last.

    Args:
        scores: `[..., L]`, -inf where a candidate must not be chosen.
        make_shares: gives the shares `[..., L]` of the attention mass that the candidates are thought to hold, whose
            rows sum to 1; only some budgets ask for them.
        first: bool `[..., L]`, candidates that are kept whatever the budget says.
        total: int64 `[...]`, how many candidates a share of blocks is a share of.
    """

    scores: Tensor
    make_shares: Callable[[], Tensor]
    first: Tensor
    total: Tensor

    @cached_property
    def ranking(self) -> Ranking:
        """From best to worst, ties to the lower index."""
        return rank(self.scores, self.first)

    @cached_property
    def shares(self) -> Tensor:
        """Share of the attention mass of each candidate, `[..., L]`."""
        return self.make_shares()

    @property
    def forced(self) -> Tensor:
        """How many leading candidates are kept whatever the budget says, int64 `[...]`."""
        return self.first.sum(-1)

    @property
    def available(self) -> Tensor:
        """How many candidates may be chosen, int64 `[...]`."""
        return (~self.scores.isneginf()).sum(-1)


@dataclass(frozen=True, eq=False)
class Budget(ABC):
    """Base of all budgets, with the limits they share.

    Args:
        scope: "row": every query block has its own ranking; "head": one ranking over all rows of a head, so that rows
            differ in width; "layer": one over all rows of all heads, so that heads differ in density too. Each row
            still keeps its best block.
        least: share of the blocks that is kept at least, rounded down. Default 0: one block.
        most: share of the blocks that is kept at most, rounded down but at least one block. Default 1.
    """

    scope: Literal["row", "head", "layer"] = "row"
    least: float = 0.0
    most: float = 1.0

    def counts(self, ranked: Ranked) -> Tensor:
        """How many leading candidates to keep, int64 `[...]`: within the limits, the forced ones, and what there is."""
        low, high = (rounded(limit, ranked.total, "floor").clamp(min=1) for limit in (self.least, self.most))
        kept = self.wanted(ranked).clamp(min=low).clamp(max=high)
        return kept.clamp(min=ranked.forced).clamp(max=ranked.available)

    def longest(self, blocks: int) -> int:
        """How many of `blocks` candidates a row keeps at most, unless more are forced: known before any score is."""
        return self._within(blocks, blocks)

    def _within(self, wanted: int, blocks: int) -> int:
        """`wanted` within the limits, of a row of `blocks` candidates; a row may hold all that a wider scope keeps."""
        if self.scope != "row":
            return blocks
        low, high = (max(1, _rounded_on_host(limit, blocks, "floor")) for limit in (self.least, self.most))
        return min(max(wanted, low), high)

    @abstractmethod
    def wanted(self, ranked: Ranked) -> Tensor:
        """How many leading candidates the rule itself asks for, int64 `[...]`."""


@dataclass(frozen=True, eq=False)
class TopK(Budget):
    """A fixed number of blocks.

    Args:
        share: share of the blocks, a number or a tensor `[H]` or `[B, H]` (one per head).
        rounding: how share times blocks becomes a number: "round" (half up), "floor", "ceil" or "plus_one" (floor + 1).
        count: the number itself, instead of a share.
    """

    share: Share = 1.0
    rounding: Rounding = "round"
    count: int | None = None

    def wanted(self, ranked: Ranked) -> Tensor:
        """See `Budget`."""
        if self.count is not None:
            return torch.full_like(ranked.total, self.count)
        return rounded(self.share, ranked.total, self.rounding)

    def longest(self, blocks: int) -> int:
        """See `Budget`; shares that are on a device are not asked for."""
        if self.count is not None:
            return self._within(min(self.count, blocks), blocks)
        if isinstance(self.share, Tensor) and self.share.device.type != "cpu":
            return super().longest(blocks)
        return self._within(_rounded_on_host(self.share, blocks, self.rounding), blocks)


@dataclass(frozen=True, eq=False)
class TopP(Budget):
    """The fewest best blocks that hold a share of the mass.

    Args:
        mass: share of the mass in (0, 1], a number or a tensor `[H]` or `[B, H]`. 1 keeps everything.
        crossing: whether the block that crosses the share is kept ("keep": kept mass >= share) or not ("drop": kept
            mass <= share).
    """

    mass: Share = 0.9
    crossing: Literal["keep", "drop"] = "keep"

    def wanted(self, ranked: Ranked) -> Tensor:
        """See `Budget`."""
        mass = per_head(self.mass, ranked.total).unsqueeze(-1)
        return ranked.ranking.reaching(ranked.shares, mass, self.crossing)


@dataclass(frozen=True, eq=False)
class Threshold(Budget):
    """The blocks whose score exceeds mean + tau · sigma of the scores of their ranking (arXiv 2607.24027).

    Args:
        tau: number of standard deviations above the mean; larger keeps fewer.
    """

    tau: float = 0.5

    def wanted(self, ranked: Ranked) -> Tensor:
        """See `Budget`; forced blocks count beside those above the threshold."""
        real = ~ranked.scores.isneginf()
        scores, count = ranked.scores.masked_fill(~real, 0), real.sum(-1, keepdim=True).clamp(min=1)
        mean = scores.sum(-1, keepdim=True) / count
        sigma = ((scores - mean).square() * real).sum(-1, keepdim=True).div(count).sqrt()
        return (real & ((scores > mean + self.tau * sigma) | ranked.first)).sum(-1)


def rounded(share: Share, total: Tensor, rounding: Rounding) -> Tensor:
    """`share` of `total` `[B, H, ...]` as a number of blocks, int64."""
    exact = per_head(share, total) * total
    if rounding == "ceil":
        return (exact - _SLACK).ceil().long()
    return (exact + {"floor": _SLACK, "round": 0.5 + _SLACK, "plus_one": 1 + _SLACK}[rounding]).floor().long()


def _rounded_on_host(share: Share, blocks: int, rounding: Rounding) -> int:
    """The largest number of blocks that a share, on the host, gives any head."""
    share = float(share.max()) if isinstance(share, Tensor) else share
    return int(rounded(share, torch.full((1, 1), blocks), rounding))


def per_head(value: Share, like: Tensor) -> Tensor:
    """A number, or one value per head `[H]` or `[B, H]`, as fp64 that broadcasts against `like` `[B, H, ...]`."""
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=widest(like.device), device=like.device)
    heads = like.shape[1]
    if value.ndim not in (1, 2) or value.shape[-1] not in (1, heads):
        raise ConfigError("budget", f"expected one value per head, [{heads}] or [B, {heads}], got {tuple(value.shape)}")
    value = to_device(value.to(widest(like.device)), like.device)
    value = value.unsqueeze(0) if value.ndim == 1 else value
    return value.reshape(*value.shape, *[1] * (like.ndim - 2))


def head_classes(recall: Tensor, density: float, gate: float = 0.8) -> Tensor:
    """Density of every head in three classes: easy heads give blocks to hard ones, the mean stays (arXiv 2502.21079).

    n heads reach the gate; the n of highest recall get half the density, the n of lowest recall that much more. In
    the paper's words: sparsity s becomes (1 + s) / 2 and (3s - 1) / 2. Unspecified there: n is at most half the heads,
    and a hard head never exceeds density 1.

    Args:
        recall: `[B, H]`, share of its mass that each head keeps at the common density.
        density: common share of blocks.
        gate: recall above which a head counts as easy. Default 0.8.

    Returns:
        fp64 `[B, H]`.
    """
    heads = recall.shape[-1]
    easy = (recall > gate).sum(-1, keepdim=True).clamp(max=heads // 2)
    order = recall.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(heads, device=order.device).expand_as(order))
    shift = min(density / 2, 1 - density)
    move = widened(rank >= heads - easy) - widened(rank < easy)
    return density + shift * move
