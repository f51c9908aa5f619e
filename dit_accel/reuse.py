"""One selection for several heads or layers: representative heads, unions over heads, and how alike two plans are.

Axis legend: B batch, H heads, g representatives, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

from functools import partial, singledispatch

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.widest import widest

Sizes = tuple[int, ...]
"""Batch rows and heads."""


def representative_heads(x: Tensor, groups: int) -> Tensor:
    """Means over `groups` runs of neighbouring heads: `[B, H, N, D]` becomes fp32 (fp64) `[B, g, N, D]`.

    Source: arXiv 2509.24745. All heads of a model turn tokens by the same rotary angles, so their mean is a
    query or key like any other.

    Raises:
        ConfigError: the heads do not divide into `groups`.
    """
    check_representatives(x.shape[1], groups)
    x = x if x.dtype == torch.float64 else x.float()
    return x.unflatten(1, (groups, -1)).mean(2)


def check_representatives(heads: int, groups: int) -> None:
    """Refuse a number of representatives that does not divide the heads.

    Raises:
        ConfigError: it does not.
    """
    if heads % groups:
        raise ConfigError("schedule.head_groups", f"expected a divisor of the {heads} heads, got {groups}")


def order_for_all(order: TokenOrder | None, made: Sizes, wanted: Sizes) -> TokenOrder | None:
    """The order of representatives as that of all batch rows and heads; see `plan_for_all`."""
    if order is None or made == wanted:
        return order
    query, key = (x if x.ndim == 1 else _spread(x, wanted) for x in (order.query, order.key_index))
    return TokenOrder(query, None if order.key is None else key)


def plan_for_all(plan: BlockPlan, made: Sizes, wanted: Sizes) -> BlockPlan:
    """The plan of representatives as that of all batch rows and heads.

    Args:
        plan: what was made.
        made: for how many rows and heads.
        wanted: for how many it shall be. Rows follow those that decided for them again and again; a head gets what the
            representative of its run of neighbours has.
    """
    return plan if made == wanted else plan.each_tensor(partial(_spread, wanted=wanted))


def _spread(x: Tensor, wanted: Sizes) -> Tensor:
    """x `[B', H', ...]` for `wanted` rows and heads; what is the same for all stays so."""
    rows, heads = (1 if x.shape[axis] == 1 else wanted[axis] // x.shape[axis] for axis in (0, 1))
    x = x if heads == 1 else x.repeat_interleave(heads, 1)
    return x if rows == 1 else x.repeat(rows, *[1] * (x.ndim - 1))


def whole_blocks(plan: BlockPlan) -> BlockPlan:
    """The part of a plan whose blocks are attended whole; a row of it may be empty."""
    if plan.full_counts is None:
        return plan
    return BlockPlan(plan.q_blocks, plan.k_blocks, plan.indices, plan.full_counts)


@singledispatch
def union_of_heads(plan: BlockPlan) -> BlockPlan:
    """The plan, shared by all heads, that keeps what any head keeps (arXiv 2510.09883 takes the maximum over heads).

    Where heads differ inside a block, it is computed whole. A kind of plan that holds more registers a rule of its own.
    """
    if plan.indices.shape[1] == 1:
        return plan
    mask = plan.to_mask().any(1, keepdim=True)
    if plan.predicate is None or not plan.predicate.is_shared:
        return BlockPlan.from_mask(mask, plan.q_blocks, plan.k_blocks)
    whole = whole_blocks(plan).to_mask().any(1, keepdim=True)
    return BlockPlan.from_mask(mask, plan.q_blocks, plan.k_blocks, whole, plan.predicate)


def overlap(plan: BlockPlan, other: BlockPlan) -> Tensor:
    """Blocks that both plans keep over blocks that one of them keeps (Jaccard), mean over batch and heads, 0-d fp64."""
    first, second = plan.to_mask(), other.to_mask()
    both, either = (x.sum((-1, -2), dtype=widest(x.device)) for x in (first & second, first | second))
    return (both / either).mean()


def for_other_layers(
    order: TokenOrder | None, plan: BlockPlan, layer_heads: str
) -> tuple[TokenOrder | None, BlockPlan]:
    """Order and plan of a layer as others of its group use them: heads of different layers share only a number.

    Args:
        order, plan: what the first layer of the group made.
        layer_heads: "union" for what any of its heads keeps, "index" for the head of the same number.

    Raises:
        ConfigError: "union" where every head has an order of its own.
    """
    if layer_heads == "index":
        return order, plan
    if order is not None and order.query.ndim == 3 and order.query.shape[1] > 1:
        raise ConfigError(
            "schedule.layer_heads", "'union' needs one order for all heads; this method orders each: use 'index'"
        )
    return order, union_of_heads(plan)
