"""A small picture of a block plan, for the report: where in the query-key square it computes, and how much per head."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_accel.plan import BlockPlan

if TYPE_CHECKING:
    from dit_accel.report.records import CallRecord

_SIDE = 48
_HEADS = 8  # more would cost memory for a picture that is averaged anyway


@dataclass(frozen=True, eq=False)
class PlanPicture:
    """What one call computed, for all heads or, with a head table, for those of one method.

    Args:
        component: which transformer.
        layer, step, branch: which call.
        method: what made the plan.
        shares: share of block pairs selected in each cell of a coarse grid, float `[rows, columns]`, averaged over
            at most eight heads of the first batch item. Queries go down, keys go right, both in the method's order.
        density_per_head: share of token pairs computed, `[heads]` (one entry where all heads share the plan).
    """

    component: str
    layer: int
    step: int
    branch: str
    method: str
    shares: Tensor
    density_per_head: Tensor

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the picture as base64 of one byte per cell. Synchronises with the device."""
        cells = (self.shares * 255).round().to(device="cpu", dtype=torch.uint8)
        return {
            "component": self.component,
            "layer": self.layer,
            "step": self.step,
            "branch": self.branch,
            "method": self.method,
            "shape": list(cells.shape),
            "shares": base64.b64encode(cells.numpy().tobytes()).decode("ascii"),
            "density_per_head": [round(share, 4) for share in self.density_per_head.tolist()],
        }


def coarse_shares(plan: BlockPlan, side: int = _SIDE) -> Tensor:
    """Share of block pairs selected in each cell of a grid of at most `side` x `side`, fp32 `[rows, columns]`."""
    heads = torch.linspace(0, plan.indices.shape[1] - 1, min(_HEADS, plan.indices.shape[1])).long()
    device, nq, nk = plan.indices.device, plan.q_blocks.count, plan.k_blocks.count
    rows, columns = min(side, nq), min(side, nk)
    index = plan.indices[0, heads.to(device)].clamp(0, nk - 1).long()
    row_of, column_of = torch.arange(nq) * rows // nq, torch.arange(nk) * columns // nk
    cell = row_of.to(device)[:, None] * columns + column_of.to(device)[index]
    counted = plan.valid[0, heads.to(device)].float()
    sums = counted.new_zeros(rows * columns).scatter_add_(0, cell.flatten(), counted.flatten())
    size = row_of.bincount()[:, None] * column_of.bincount()
    return sums.view(rows, columns) / (size * len(heads)).to(device)


def picture(plan: BlockPlan, record: CallRecord, method: str) -> PlanPicture:
    """Take the picture of a plan of the call `record`; no synchronisation with the device."""
    return PlanPicture(
        record.component,
        record.layer,
        record.step,
        record.branch,
        method,
        coarse_shares(plan),
        plan.density_per_head()[0],
    )
