"""What tells a kernel how to treat the blocks that were not selected. Methods name it, backends obey it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Remainder:
    """How the key blocks that a query block did not select enter its softmax: one summary key per block.

    A block of n keys with mean key m and mean value u enters with the logit scale * q·m + ln n + w and the value u.
    Exact and summary keys share one softmax and one maximum.

    Args:
        mass: the correction w to the block's log-mass. "mean": w = 0, low by Jensen's inequality (the pooled branch of
            piecewise sparse attention, arXiv 2602.01077); "diagonal": w = ½ Σ_d (scale * q_d)² var_d, the second-order
            term with a diagonal covariance, capped at ln n, the largest value it can have.
    """

    mass: Literal["mean", "diagonal"] = "mean"
