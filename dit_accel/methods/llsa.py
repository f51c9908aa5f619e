"""Log-linear sparse attention: blocks chosen from coarse to fine, and a cover of the rest at two resolutions.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks, m nodes of the coarse level.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit_accel.kernels.spec import Remainder
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method, Size
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.space import morton_order
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.remainders.mean_keys import join_means
from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection import TopK, block_means, own_blocks, plan_of_mask, select_blocks, sink_blocks
from dit_accel.state import CallContext
from dit_accel.transfer import to_device


@register("llsa")
class LLSA(Method):
    """LLSA (arXiv 2512.16615) without training: hierarchical top-k, every other key in exactly one pooled node.

    Coarse nodes are runs of `block` blocks along the Z-order curve. Each keeps its best coarse nodes; each query block
    then keeps the best blocks inside those of its own node. Selected blocks are exact. The other blocks of a coarse
    node that holds a selected one enter the same softmax as one mean key each, all other coarse nodes as one mean key
    for the whole node, with the logarithm of their size added to the logit. Conditioning frames are always selected, if
    need be beyond `keep`.

    The published cover overlaps (a pooled node stands beside its own tokens), which training makes up for; this one is
    disjoint. Mass is pooled from tokens, not from pooled blocks. Text is whole.

    Args:
        block: tokens per block, and blocks per coarse node. Default 16, as published.
        keep: blocks and coarse nodes that are kept per level. Default 8, as published.
        levels: 1: no coarse level; the rest is one mean key per block.
    """

    source: ClassVar[str] = "arXiv 2512.16615"

    block: Annotated[int, Field(ge=2, le=256)] = 16
    keep: Size = 8
    levels: Literal[1, 2] = 2

    @property
    def has_static_order(self) -> bool:
        """Yes: a curve."""
        return True

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """The Z-order curve."""
        return morton_order(call.layout)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Top-k from coarse to fine; a block keeps itself and conditioning frames. q, k `[B, H, N, D]`."""
        layout, blocks = call.layout, call.layout.blocks(self.block)
        fine = _products(q, k, blocks, layout)
        allowed = torch.ones_like(fine, dtype=torch.bool)
        if self.levels == 2:
            nodes, node = self._nodes(layout, blocks)
            best = self._best(_products(q, k, nodes, layout), nodes, layout)
            node = to_device(node, q.device)
            allowed = best[..., node, :][..., node]
        mask = self._best(fine.masked_fill(~allowed, -torch.inf), blocks, layout)
        return plan_of_mask(mask, blocks, blocks, layout, ~fine.isneginf())

    def _best(self, scores: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
        """The `keep` best of each row `[B, H, n, n]`, among them the own one and those of conditioning frames."""
        forced = own_blocks(blocks, blocks)
        if layout.prefix_frames:
            forced = forced | sink_blocks(layout, blocks, 0, morton_order(layout))
        return select_blocks(scores, TopK(count=self.keep), forced)

    def _nodes(self, layout: TokenLayout, blocks: Blocking) -> tuple[Blocking, Tensor]:
        """The coarse nodes, and the node of each block, int64 `[nk]`."""
        nodes = layout.blocks(self.block**2)
        return nodes, torch.searchsorted(nodes.starts, blocks.starts[:-1], right=True) - 1

    @property
    def remainder(self) -> Remainder | None:
        """With one level, one mean key per block."""
        return Remainder() if self.levels == 1 else None

    @property
    def completes(self) -> bool:
        """With two levels, the cover is added after the kernel."""
        return self.levels == 2

    def complete(self, part: PartialAttention) -> Tensor:
        """Blocks beside selected ones, and coarse nodes without a selected block, join the softmax."""
        layout, blocks, q = part.layout, part.plan.k_blocks, part.q
        nodes, node = self._nodes(layout, blocks)
        selected = part.plan.to_mask().expand(*q.shape[:2], -1, -1)
        held = torch.zeros(*selected.shape[:3], nodes.count, device=q.device)
        opened = held.index_add_(-1, node.to(q.device), selected.float()) > 0
        pooled = [[block_means(x, runs, layout.valid) for runs in (blocks, nodes)] for x in (part.k, part.v)]
        keys, values = (torch.cat([means for means, _ in levels], 2) for levels in pooled)
        sizes = torch.cat([count for _, count in pooled[0]], -1)
        free = torch.cat([opened[..., node] & ~selected, ~opened], -1)
        bias = sizes.log().unsqueeze(-2).masked_fill(~free, -torch.inf)
        return join_means(part, keys, values, bias)


def _products(q: Tensor, k: Tensor, blocks: Blocking, layout: TokenLayout) -> Tensor:
    """Products of mean queries and mean keys `[B, H, n, n]`, -inf at blocks without real keys."""
    (queries, _), (keys, counts) = block_means(q, blocks, layout.valid), block_means(k, blocks, layout.valid)
    return (queries @ keys.transpose(-1, -2)).masked_fill(counts.unsqueeze(-2) == 0, -torch.inf)
