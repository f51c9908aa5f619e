"""A plan and an order for some query tokens alone, where a process holds no others or wants no others."""

from __future__ import annotations

from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan


def rows_of_plan(plan: BlockPlan, tokens: Tensor) -> BlockPlan:
    """The plan of some query tokens over all keys; a query block keeps as many tokens as it holds of them.

    Args:
        plan: of all queries.
        tokens: ascending positions in its query axis, int64 `[n]` with n >= 1, on the CPU.
    """
    blocks, lengths = plan.q_blocks.block_of_token()[tokens].unique_consecutive(return_counts=True)
    rows = blocks.to(plan.indices.device)
    return BlockPlan(
        Blocking.from_lengths(lengths, plan.q_blocks.size),
        plan.k_blocks,
        plan.indices[:, :, rows],
        plan.counts[:, :, rows],
        None if plan.full_counts is None else plan.full_counts[:, :, rows],
        None if plan.predicate is None else plan.predicate.of_queries(tokens),
    )


def rows_of_order(order: TokenOrder, tokens: Tensor) -> tuple[TokenOrder, Tensor]:
    """The order of some query tokens among themselves, and of all keys.

    Args:
        order: of all tokens, the same for all heads.
        tokens: ascending indices in the raster, int64 `[n]`.

    Returns:
        The order, whose queries are counted within `tokens`; where those stand in the order of all, ascending, int64
        `[n]` on the CPU.

    Raises:
        PlanError: heads differ in their order.
    """
    if order.query.ndim != 1:
        raise PlanError(
            "rows_of_order: expected one order for all heads, got one per head, whose query blocks hold other tokens "
            "in each"
        )
    at, among = order.inverse[tokens.to(order.query.device)].sort()
    return TokenOrder(among, order.key_index), at.cpu()
