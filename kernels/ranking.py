"""Candidates of a row from best to worst, and how many of them to keep: by sorting, or in Triton without a sort.

The forced ones come first, then the others by falling score; ties go to the lower index. Axis legend: `[...]` rows,
L candidates of one row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from dit_accel.kernels.operations import register_operation, uses_triton
from dit_accel.kernels.triton_configs import next_power_of_two
from dit_accel.widest import widened

Crossing = Literal["keep", "drop"]
# Rounding of sums of shares must not decide whether they reach a given share.
_SLACK = 1e-12
_LONG_ROW = 1024  # from here on a selection per row beats one sort of all
_LONGEST_ROW = 4096  # scores that the registers of one program hold
_CHUNK, _AT_ONCE = 1 << 16, 2048  # candidates of a longer row that a program counts, and holds at a time


@dataclass(frozen=True, eq=False)
class Ranking(ABC):
    """A ranking of the candidates of each row.

    Args:
        scores: fp32 or fp64 `[..., L]`, higher is better.
        first: bool like scores, candidates that stand before all others.
    """

    scores: Tensor
    first: Tensor

    @abstractmethod
    def leading(self, counts: Tensor) -> Tensor:
        """The `counts` best candidates of each row, bool `[..., L]`. counts: int64 `[...]`."""

    @abstractmethod
    def reaching(self, shares: Tensor, mass: Tensor, crossing: Crossing) -> Tensor:
        """How many leading candidates hold a share of the mass, int64 `[...]`.

        Args:
            shares: `[..., L]`, what each candidate holds; never negative.
            mass: fp64, broadcasts against `[..., 1]`. From 1 on: all candidates.
            crossing: whether the candidate that crosses `mass` is counted.
        """


class SortedRanking(Ranking):
    """One stable sort of every row; on every device, for rows of every length."""

    @cached_property
    def _order(self) -> Tensor:
        return self.scores.masked_fill(self.first, torch.inf).argsort(dim=-1, descending=True, stable=True)

    def leading(self, counts: Tensor) -> Tensor:
        """See `Ranking`."""
        kept = torch.arange(self.scores.shape[-1], device=counts.device) < counts.unsqueeze(-1)
        return torch.zeros_like(self.first).scatter_(-1, self._order, kept)

    def reaching(self, shares: Tensor, mass: Tensor, crossing: Crossing) -> Tensor:
        """See `Ranking`."""
        # In fp64, as many small shares add up to little.
        shares = widened(shares.gather(-1, self._order))
        reached = shares.cumsum(-1)
        below = reached - shares < mass - _SLACK if crossing == "keep" else reached <= mass + _SLACK
        return (below | (mass >= 1)).sum(-1)


class LongRanking(SortedRanking):
    """Few rows of many candidates: the cut is a selection, which costs a fraction of a sort on a CPU."""

    def leading(self, counts: Tensor) -> Tensor:
        """See `Ranking`."""
        rows = self.scores.masked_fill(self.first, torch.inf).flatten(0, -2)
        kept = torch.zeros(rows.shape, dtype=torch.bool, device=rows.device)
        for row, chosen, count in zip(rows, kept, counts.flatten().tolist(), strict=True):
            if count:
                cut = row.kthvalue(len(row) - count + 1).values
                ties = row == cut
                torch.gt(row, cut, out=chosen)
                chosen |= ties & (ties.cumsum(-1) <= count - chosen.sum())
        return kept.view(self.scores.shape)


class CutRanking(Ranking):
    """The cut is found bit by bit in the registers of one program per row; nothing is sorted."""

    def leading(self, counts: Tensor) -> Tensor:
        """See `Ranking`."""
        from dit_accel.kernels.triton_selection import leading

        kept = torch.empty(self.scores.shape, dtype=torch.bool, device=self.scores.device)
        columns = self.scores.shape[-1]
        with torch.cuda.device_of(self.scores):
            leading[(self.scores.numel() // columns,)](
                self.scores.contiguous(), _bytes(self.first), counts.to(torch.int32).contiguous(),
                kept.view(torch.uint8), columns, **_sizes(columns),
            )  # fmt: skip
        return kept

    def reaching(self, shares: Tensor, mass: Tensor, crossing: Crossing) -> Tensor:
        """See `Ranking`."""
        from dit_accel.kernels.triton_selection import reaching

        *rows, columns = self.scores.shape
        counts = torch.empty(rows, dtype=torch.int32, device=self.scores.device)
        mass = mass.squeeze(-1) if mass.ndim else mass
        with torch.cuda.device_of(self.scores):
            reaching[(self.scores.numel() // columns,)](
                self.scores.contiguous(), _bytes(self.first), shares.contiguous(),
                mass.expand(rows).contiguous(), counts, columns,
                SLACK=_SLACK, KEEP=crossing == "keep", **_sizes(columns),
            )  # fmt: skip
        return counts.long()


class DigitRanking(SortedRanking):
    """The digits of the cut are counted, one after the other, by many programs per row: for rows of any length."""

    def leading(self, counts: Tensor) -> Tensor:
        """See `Ranking`."""
        from dit_accel.kernels.triton_ranking import digit_counts, keep_leading

        columns, device = self.scores.shape[-1], self.scores.device
        rows, parts = self.scores.numel() // columns, -(-columns // _CHUNK)
        scores, first = self.scores.contiguous(), _bytes(self.first)
        wanted = counts.to(torch.int64).clamp(max=columns).flatten()
        # Bits of the cut so far, and how many candidates lie above all that begin with them.
        prefix, above = torch.zeros_like(wanted), torch.zeros_like(wanted)
        found = torch.empty(rows, parts, 256, dtype=torch.int32, device=device)
        kept = torch.empty(self.scores.shape, dtype=torch.bool, device=device)
        with torch.cuda.device_of(scores):
            for shift in (24, 16, 8, 0):
                digit_counts[rows, parts](
                    scores, first, prefix, found, columns, _CHUNK, shift, COLUMNS=_AT_ONCE, num_warps=4
                )
                at_least = found.sum(1).flip(-1).cumsum(-1).flip(-1)
                digit = (at_least >= (wanted - above).unsqueeze(-1)).sum(-1, keepdim=True) - 1
                above = above + torch.nn.functional.pad(at_least, (0, 1)).gather(-1, digit + 1).squeeze(-1)
                prefix = 256 * prefix + digit.squeeze(-1)
            ties = found.gather(-1, digit.unsqueeze(1).expand(-1, parts, 1)).squeeze(-1)
            before = ties.cumsum(-1) - ties
            keep_leading[rows, parts](
                scores, first, prefix, wanted - above, before, kept.view(torch.uint8), columns, _CHUNK,
                COLUMNS=_AT_ONCE, num_warps=4,
            )  # fmt: skip
        return kept


def _bytes(mask: Tensor) -> Tensor:
    return mask.contiguous().view(torch.uint8)


def _sizes(columns: int) -> dict[str, int]:
    padded = max(16, next_power_of_two(columns))
    return {"COLUMNS": padded, "num_warps": 4 if padded <= 2048 else 8}


def rank(scores: Tensor, first: Tensor) -> Ranking:
    """Rank the candidates of each row; `scores` `[..., L]`, and `first` bool like it."""
    if scores.dtype == torch.float32 and uses_triton("rank", scores):
        return (CutRanking if scores.shape[-1] <= _LONGEST_ROW else DigitRanking)(scores, first)
    is_long = scores.device.type == "cpu" and scores.shape[-1] >= _LONG_ROW
    return (LongRanking if is_long else SortedRanking)(scores, first)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    # Few values, so that many tie.
    scores = torch.randint(-3, 4, (2, 3, 40), generator=generator).to(device, torch.float32)
    first = (torch.rand(2, 3, 40, generator=generator) < 0.1).to(device)
    counts = torch.randint(0, 41, (2, 3), generator=generator).to(device)
    plain, fast = SortedRanking(scores, first), CutRanking(scores, first)
    for ranking in (fast, DigitRanking(scores, first)):
        if not torch.equal(plain.leading(counts), ranking.leading(counts)):
            return "it keeps others than the best"
    shares, mass = scores.softmax(-1), torch.tensor(0.6, dtype=torch.float64, device=device)
    for crossing in ("keep", "drop"):
        if not torch.equal(plain.reaching(shares, mass, crossing), fast.reaching(shares, mass, crossing)):
            return "it counts the shares wrongly"
    return None


register_operation("rank", _check)
