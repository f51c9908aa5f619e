"""The values that tell a kernel how to compute: remainder and precision. Methods name them, backends obey them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_accel.errors import PlanError

FirstOrder = Literal["none", "block", "grouped", "global"]


@dataclass(frozen=True)
class Remainder:
    """How the key blocks that a query block did not select enter its softmax, as block statistics.

    A block of n keys with mean key m, mean value u enters as one summary key with logit q·m·scale + ln n + w and
    value u, plus, with a first-order term, the Taylor term of its numerator. One softmax, one running maximum.

    Args:
        mass: the correction w to the block's log-mass. "mean": w = 0 (order 0, biased low by Jensen's inequality);
            "diagonal": w = ½ Σ_d (scale·q_d)² var_d, the second-order term with a diagonal covariance, capped at ln n,
            its largest possible value.
        first_order: the first-order numerator term. "none"; "block": q·H_j per block, H_j the block's key-value
            covariance (exact to first order, expensive); "grouped": H averaged over `group` neighbouring blocks;
            "global": averaged over all unselected blocks of the head (what the PISA kernel does, arXiv 2602.01077).
        group: blocks per group for "grouped". Default 32.
    """

    mass: Literal["mean", "diagonal"] = "mean"
    first_order: FirstOrder = "none"
    group: int = 32

    def __post_init__(self) -> None:
        if self.group < 1:
            raise PlanError(f"Remainder.group: expected at least 1, got {self.group}")


@dataclass(frozen=True)
class Precision:
    """The arithmetic of the exact part.

    Args:
        qk: "input": the dtype of q and k, accumulated in fp32; "int8": q and k quantised per block of tokens.
        smooth_k: subtract the mean key of each head before quantising (leaves the softmax unchanged).
        pv: "input" or "fp8" (e4m3, sm_89 and newer).
    """

    qk: Literal["input", "int8"] = "input"
    smooth_k: bool = True
    pv: Literal["input", "fp8"] = "input"
