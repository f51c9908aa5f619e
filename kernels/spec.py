"""What tells a kernel what to compute: plan, remainder and precision. Methods name them, backends obey them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.plan import BlockPlan

FirstOrder = Literal["none", "block", "mixed", "grouped", "global"]
PrecisionName = Literal["input", "int8", "int8_fp8"]


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
        pv: "input": the dtype of v; "fp8": weights and values in e4m3, summed in fp32. Values lose the mean of the real
            values of a head first and get it back at the end; each channel of a head has one scale, max|v| / 448 + 1e-7
            (arXiv 2411.10958, which keeps the mean). The weights of a query, those of the logits of the keys as
            smoothed, are scaled by a power of two that brings the largest into (128, 256], and summed before they are
            rounded. Those below 2**-14 of the largest lose bits; a
            backend that has not met the largest yet may keep more of them.
        skip: leave out a tile (a selected key block, or a part of it, seen by the queries of a query block, or by some
            of them) where the largest logit of each query lies at least this far below the largest one of the tiles
            before it in the list, natural logarithm. Default None: never. A tile left out is as if not selected, but
            no summary stands for it. Sequential by nature: which tiles are left out depends on the order of the list
            and on how a backend cuts blocks into tiles (arXiv 2502.18137, as released).

    Raises:
        PlanError: `skip` is negative or NaN.
    """

    qk: Literal["input", "int8"] = "input"
    smooth_k: bool = True
    skip: float | None = None
    pv: Literal["input", "fp8"] = "input"

    def __post_init__(self) -> None:
        if self.skip is not None and not self.skip >= 0:
            raise PlanError(f"Precision.skip: expected at least 0, got {self.skip}")

    @classmethod
    def named(cls, name: PrecisionName, smooth_k: bool = True, skip: float | None = None) -> Precision | None:
        """What methods and presets call by one name; None where that is the arithmetic of the inputs.

        Args:
            name: "input"; "int8": queries and keys in INT8; "int8_fp8": weights and values in e4m3 besides.
            smooth_k, skip: as above.
        """
        if name == "input" and skip is None:
            return None
        return cls("input" if name == "input" else "int8", smooth_k, skip, "fp8" if name == "int8_fp8" else "input")


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of `block_attention` without q, k and v, as every backend takes it.

    Args:
        plan: which key blocks each query block attends, on the device of q.
        scale: factor on the logits.
        remainder: what becomes of the others; None drops them.
        precision: see `Precision`; None is that of the inputs.
        kv_len: int `[B]`, how many leading keys are real; None: all.
    """

    plan: BlockPlan
    scale: float
    remainder: Remainder | None = None
    precision: Precision | None = None
    kv_len: Tensor | None = None
