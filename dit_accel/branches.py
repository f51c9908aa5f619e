"""One choice of key blocks for all guidance branches of a step, as calls of their own or as rows of one batch.

Guidance multiplies what differs between branches, and so it does with errors unless they are alike.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks, C selected blocks of the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext, RunState

_KEY = "choice"


@dataclass(frozen=True, eq=False)
class _Choice:
    """What a branch chose, until the others of its step come: for every layer and head, so it is kept small.

    Args:
        branch: who chose.
        key: for what: another branch must agree in it.
        plan: its indices are left out where `indices` holds them.
        indices: int16 `[B, H, nq, C]`.
    """

    branch: str
    key: tuple[Any, ...]
    plan: BlockPlan
    indices: Tensor | None


def keep_choice(method: Method, q: Tensor, call: CallContext, plan: BlockPlan) -> None:
    """Let the other branches of this step have `plan`, where `method` decides for them; q `[B, H, N, D]`."""
    if not method.decides_for_branches:
        return
    indices = None
    if plan.k_blocks.count < 1 << 15:
        indices = plan.indices.to(torch.int16)
        plan = replace(plan, indices=plan.indices.new_zeros(*plan.counts.shape, 0))
    call.branches[_KEY] = _Choice(call.branch, _key(method, q, call), plan, indices)


def choice_of_other_branch(method: Method, q: Tensor, call: CallContext) -> BlockPlan | None:
    """What another branch chose at this step for the same geometry; q `[B, H, N, D]`."""
    made: _Choice | None = call.branches.get(_KEY)
    if made is None or made.branch == call.branch or made.key != _key(method, q, call):
        return None
    return made.plan if made.indices is None else replace(made.plan, indices=made.indices.int())


def _key(method: Method, q: Tensor, call: CallContext) -> tuple[Any, ...]:
    return (method, call.step, call.layout, q.shape, q.device)


def deciding_rows(method: Method, state: RunState, layout: TokenLayout, rows: int) -> slice | None:
    """The batch rows that decide for all, where guidance branches are rows of one batch; None: each for itself.

    Pipelines put the conditional rows last. Where a step cache runs one of the branches, or branches differ in their
    padding, each row decides for itself.

    Args:
        method: may decide for branches, or not.
        state: the pass, whose batch may hold several branches.
        layout: token geometry.
        rows: of the call.
    """
    share = rows // state.branches_in_batch
    if not method.decides_for_branches or share == rows or rows != state.batch:
        return None
    valid = layout.valid or (layout.tokens,) * rows
    return slice(rows - share, rows) if valid == valid[-share:] * state.branches_in_batch else None


def of_rows(qkv: tuple[Tensor, Tensor, Tensor], rows: slice | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, H, N, D]` of some batch rows; None: of all."""
    if rows is None:
        return qkv
    q, k, v = qkv
    return q[rows], k[rows], v[rows]


def layout_of_rows(layout: TokenLayout, rows: slice | None) -> TokenLayout:
    """The geometry of some batch rows; None: of all."""
    return layout if rows is None or layout.valid is None else replace(layout, valid=layout.valid[rows])
