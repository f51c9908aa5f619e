"""SpargeAttn: blocks ranked by their means, blocks whose tokens disagree never left out."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from dit_accel.kernels.spec import Precision, PrecisionName
from dit_accel.methods.base import BlockSize, Density
from dit_accel.methods.dynamic import PoolingMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.selection import Budget, Rounding, TopP, pooled_scores, self_similarity, smooth_keys
from dit_accel.state import CallContext

Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Cosine = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


@register("sparge")
class Sparge(PoolingMethod):
    """Mean-pooled top-k or top-p, with a gate: a block whose tokens are not alike is not judged by its mean but kept.

    Keys are smoothed first, which changes no attention weight but makes the gate see what differs between tokens.
    Kept-by-the-gate blocks come on top of the budget, as published.

    A second filter inside the kernel (`pv_threshold`) leaves out selected tiles whose scores turn out to lie far below
    the running maximum: their product with the values and their share of the denominator. The denominator is that of
    the released code; the paper's algorithm 1 still adds the skipped weights to it. Published is one limit per head,
    tuned on samples, and a decision of the queries of a block or of a warp; here one number serves all heads, and the
    queries of a tile of the kernel decide together.

    Args:
        density: share of key blocks by rank, rounded down; None for the rule of `mass`.
        mass: share of the mass that the kept blocks stay within (the crossing block is left out), with density None.
        similarity: the gate: query and key blocks whose mean pairwise cosine is not above this are attended whole.
            Any value below 0 turns it off, as the similarity is never negative; the released default, -0.1, does so.
        smooth: subtract the mean key of each head before keys are compared and quantised; pooled scores rank alike.
        precision: "input"; "int8": queries and keys of the exact part are quantised to 8 bits, as published;
            "int8_fp8": weights and values, too, as released for compute capability 8.9 and later.
        pv_threshold: leave out tiles in which every query has seen a score at least this much larger before, in units
            of log 2 as the released `pvthreshd`: a key left out weighs at most 2**-pv_threshold of the largest weight.
            Released default: 50, which changes nothing that half precision could show; tuned ones are smaller.
            Default None: no tile is left out. On a GPU only the Triton backend obeys it, and none does on compute
            capability 10.x, where the call fails with the reason.
        block, key_block: 128 and 64 tokens, as released for most GPUs.
    """

    source: ClassVar[str] = "arXiv 2502.18137"

    density: Density | None = 0.5
    mass: Share = 0.97
    similarity: Cosine = 0.2
    smooth: bool = True
    precision_: PrecisionName = Field(default="input", alias="precision")
    pv_threshold: Threshold | None = None
    block: BlockSize = 128
    key_block: BlockSize | None = 64

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Pooled log-mass; smoothing would move all scores of a row alike. q, k `[B, H, N, D]`."""
        return pooled_scores(q, k, q_blocks, call.layout, k_blocks, self.padding)

    def beside(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor | None:
        """Rows and columns of blocks whose tokens disagree."""
        if self.similarity < 0:
            return None
        valid = call.layout.valid
        keys = smooth_keys(k, valid) if self.smooth else k
        rows = self_similarity(q, q_blocks, valid, self.padding) <= self.similarity
        columns = self_similarity(keys, k_blocks, valid, self.padding) <= self.similarity
        return rows.unsqueeze(-1) | columns.unsqueeze(-2)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p without the crossing block."""
        return TopP(mass=self.mass, crossing="drop")

    @property
    def rounding(self) -> Rounding:
        """Down."""
        return "floor"

    @property
    def precision(self) -> Precision | None:
        """As chosen; the kernels know the threshold in natural logarithms."""
        skip = None if self.pv_threshold is None else self.pv_threshold * math.log(2)
        return Precision.named(self.precision_, self.smooth, skip)
