"""What tells a kernel how to compute: remainder and precision. Methods name them, backends obey them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dit_accel.errors import PlanError

FirstOrder = Literal["none", "block", "mixed", "grouped", "global"]


@dataclass(frozen=True)
class Remainder:
    """How the key blocks that a query block did not select enter its softmax: one summary key per block.

    Exact and summary keys share one softmax and one maximum. A summary is an expansion about one of two points.

    About the mean key: a block of n keys with mean key m and mean value u enters with the logit scale * q·m + ln n + w
    and the value u. Its error is that of exp(scale * q·(k - m)): it falls with the spread of the keys alone.

    About the mean query: let c be the mean of the real queries of the query block. A block of keys enters with the
    logit ln Σ exp(scale * c·k) + scale * (q - c)·m and the value that c would get from the block. Its error falls with
    the spread of the queries and with that of the keys, and needs no cap: all of c's own logits are exact. It costs
    one pass of the mean queries over all keys, 1 / block size of dense attention.

    A first-order term changes the numerator alone, because the deviations from the mean key sum to zero: for blocks g
    with weight p_g in the softmax and t_g keys it adds Σ_g (p_g / t_g) * scale * x·H_g, where
    H_g = Σ (k - m) vᵀ over the keys of g, each with the mean of its own block, and x is q, or q - c about the query.

    Args:
        about: "key", or "query" (this project).
        mass: the correction w to the block's log-mass, about the key only. "mean": w = 0, low by Jensen's inequality
            (the pooled branch of piecewise sparse attention, arXiv 2602.01077); "diagonal": w = ½ Σ_d (scale * q_d)²
            var_d, the second-order term with a diagonal covariance, capped at ln n, the largest value it can have.
        first_order: over what H is summed. "none": no such term; "block": every block alone (exact to first order,
            costs head_dim / block size of dense attention); "mixed": the same with p_g averaged over the query block
            (costs head_dim / (2 * block size²) of dense attention; this project); "grouped": `group` neighbouring
            blocks, selected ones included, as in arXiv 2604.12219; "global": all blocks of the head, as in
            arXiv 2602.01077.
        group: blocks per group for "grouped". Default 32.

    Raises:
        PlanError: `group` is below 1, or a correction of the mass is asked for about the query.
    """

    mass: Literal["mean", "diagonal"] = "mean"
    first_order: FirstOrder = "none"
    group: int = 32
    about: Literal["key", "query"] = "key"

    def __post_init__(self) -> None:
        if self.group < 1:
            raise PlanError(f"Remainder.group: expected at least 1, got {self.group}")
        if self.about == "query" and self.mass != "mean":
            raise PlanError(
                f"Remainder.mass: expected 'mean' with about='query', whose mass is exact, got {self.mass!r}"
            )

    def blocks_per_group(self, blocks: int) -> int:
        """How many of `blocks` key blocks share one H; 0 without a first-order term."""
        sizes = {"none": 0, "block": 1, "mixed": 1, "grouped": min(self.group, blocks), "global": blocks}
        return sizes[self.first_order]


@dataclass(frozen=True)
class Precision:
    """The arithmetic of the exact part.

    Args:
        qk: "input": the dtype of q and k, accumulated in fp32; "int8": q and k are quantised symmetrically, one scale
            per block of the plan: max|x| / 127 + 1e-7, rounded half away from zero (arXiv 2410.02367).
        smooth_k: with "int8", subtract the mean of all real keys of a head first; the softmax does not change, and
            the log-sum-exp is corrected for it.
    """

    qk: Literal["input", "int8"] = "input"
    smooth_k: bool = True
