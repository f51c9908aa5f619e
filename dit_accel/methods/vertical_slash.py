"""Vertical and slash lines: a few key columns and a few diagonals, found from sampled queries."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Method, Size
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.sampling import sample_rows, sampled_logits
from dit_accel.selection import plan_of_mask, sink_blocks
from dit_accel.selection.scores import block_sums
from dit_accel.state import CallContext


@register("vertical_slash")
class VerticalSlash(Method):
    """Vertical-slash (arXiv 2407.02490) in both directions: key columns and diagonals with the most attention mass.

    The original is causal and looks at the last 64 queries: the corner of the last frame, or padding. Here (ours) the
    rows are drawn from the whole video, diagonals go both ways, their mass is divided by the pairs that were seen, and
    both lines compete as blocks: a diagonal at a multiple of the frame costs as much as `block` of them, so these are
    scored together. Heads whose diagonals lie there are cheaper as "multi_diagonal" of `sparse_vdit`. Published budgets
    (language models): (1000, 6096), (30, 800), (100, 750), (500, 700), (3500, 100); none for video models.

    Args:
        vertical: key columns per head, in tokens, rounded up to blocks.
        slash: diagonals per head, in tokens, rounded up to bins of `block`.
        near: diagonals with |i - j| <= `near` are always kept, and counted in `slash`. Default 100.
        sink_frames: leading frames that are always kept, and counted in `vertical`. Default 0.
        rows: sampled queries.
        block: block size in tokens.
    """

    source: ClassVar[str] = "arXiv 2407.02490"

    vertical: Size = 1000
    slash: Size = 6096
    near: Count = 100
    sink_frames: Count = 0
    rows: Size = 64
    block: BlockSize = 64

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Blocks on a kept column or diagonal. q, k `[B, H, N, D]` in raster order; text is whole."""
        layout = call.layout
        blocks, rows = layout.blocks(self.block), sample_rows(layout, self.rows, call.seed, call.layer, call.step)
        columns, diagonals = line_scores(q, k, rows, layout, self.block)
        video = ~layout.text_blocks(blocks)
        sink = sink_blocks(layout, blocks, self.sink_frames)[video].to(q.device)
        column = _best(columns, -(-self.vertical // self.block), sink)
        count = columns.shape[-1]
        low = (torch.arange(2 * count) - count) * self.block
        near = (low <= self.near) & (low + self.block - 1 >= -self.near)
        diagonal = _best(diagonals, -(-self.slash // self.block), near.to(q.device))
        # The tokens of a block pair I, J are between (I - J - 1) * block and (I - J + 1) * block apart: two bins.
        touched = diagonal[..., 1:] | diagonal[..., :-1]
        index = torch.arange(count, device=q.device)
        mask = touched[..., index.unsqueeze(-1) - index + count - 1] | column.unsqueeze(-2)
        first = int(video.nonzero()[0])
        mask = F.pad(mask, (first, blocks.count - count - first) * 2)
        return plan_of_mask(mask, blocks, blocks, layout, _real_blocks(blocks, layout, q.device))


def line_scores(q: Tensor, k: Tensor, rows: Tensor, layout: TokenLayout, block: int) -> tuple[Tensor, Tensor]:
    """Attention mass of key columns and, per pair of tokens seen, of diagonals, of the sampled queries.

    Args:
        q, k: `[B, H, N, D]` in raster order.
        rows: int64 `[m]`, sampled video tokens.
        layout: token geometry.
        block: width of a column and of a diagonal in tokens.

    Returns:
        Columns `[B, H, n]`, one per block of the video, and diagonals `[B, H, 2 n]`: entry c holds the distances i - j
        in [(c - n) * block, (c - n + 1) * block).
    """
    blocks = Blocking.uniform(layout.video, block)
    distance = (rows - layout.video_start).unsqueeze(-1) - torch.arange(layout.video)
    bins = (distance.div(block, rounding_mode="floor") + blocks.count).flatten()
    pairs = bins.bincount(minlength=2 * blocks.count).clamp(min=1).to(q.device)
    bins = bins.to(q.device)
    columns, diagonals = [], []
    for _, logits in sampled_logits(q, k, rows, layout):
        mass = logits.softmax(-1)[..., layout.video_slice()]
        columns.append(block_sums(mass.sum(2), blocks))
        sums = mass.new_zeros(*mass.shape[:2], 2 * blocks.count)
        diagonals.append(sums.index_add_(-1, bins, mass.flatten(2)) / pairs)
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def _best(scores: Tensor, keep: int, forced: Tensor) -> Tensor:
    """Bool like `scores` `[B, H, n]`: the `keep` best, the forced ones `[n]` first; ties go to the lower index."""
    keep = min(max(keep, int(forced.sum())), scores.shape[-1])
    ranked = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked[..., :keep], True)


def _real_blocks(blocks: Blocking, layout: TokenLayout, device: torch.device) -> Tensor:
    """Bool `[B or 1, 1, 1, n]`: blocks that hold a real token."""
    lengths = torch.tensor(layout.valid or (layout.tokens,), device=device).view(-1, 1, 1, 1)
    return blocks.on(device)[0] < lengths
