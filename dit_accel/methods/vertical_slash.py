"""Vertical and slash lines: a few key columns and a few diagonals, found from sampled queries."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Density, Method, Size
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.sampling import sample_rows, sampled_logits
from dit_accel.selection import plan_of_mask, sink_blocks
from dit_accel.selection.scores import block_sums
from dit_accel.state import CallContext
from dit_accel.transfer import to_device
from dit_accel.widest import widened, widest

_SEARCH_STEPS = 12


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
        density: scale both budgets by one factor per head, the largest that keeps no more than this share of the pairs
            of blocks; forced lines and text stay. Default None: `vertical` and `slash` decide.
        near: diagonals with |i - j| <= `near` are always kept, and counted in `slash`. Default 100.
        sink_frames: leading frames that are always kept, and counted in `vertical`. Default 0.
        rows: sampled queries.
        block: block size in tokens.
    """

    source: ClassVar[str] = "arXiv 2407.02490"

    vertical: Size = 1000
    slash: Size = 6096
    density: Density | None = None
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
        sink = sink_blocks(layout, blocks, self.sink_frames)[video]
        count = columns.shape[-1]
        low = (torch.arange(2 * count) - count) * self.block
        near = (low <= self.near) & (low + self.block - 1 >= -self.near)
        column, diagonal = (
            _ranks(x, to_device(forced, q.device)) for x, forced in ((columns, sink), (diagonals, near))
        )
        column, touched = self._lines(column, diagonal, int(sink.sum()), int(near.sum()))
        index = torch.arange(count, device=q.device)
        mask = touched[..., index.unsqueeze(-1) - index + count - 1] | column.unsqueeze(-2)
        first = int(video.nonzero()[0])
        mask = F.pad(mask, (first, blocks.count - count - first) * 2)
        return plan_of_mask(mask, blocks, blocks, layout, _real_blocks(blocks, layout, q.device))

    def _lines(self, column: Tensor, diagonal: Tensor, sink: int, near: int) -> tuple[Tensor, Tensor]:
        """Columns bool `[B, H, n]` and distances of blocks `[B, H, 2 n - 1]` that are kept.

        Args:
            column, diagonal: ranks of columns and of bins of diagonals, int64 `[B, H, n]` and `[B, H, 2 n]`.
            sink, near: how many of them are forced, and rank first.
        """
        budgets = [-(-self.vertical // self.block), -(-self.slash // self.block)]
        if self.density is None:
            return column < max(budgets[0], sink), _touched(diagonal < max(budgets[1], near))
        if self.density == 1:
            return torch.ones_like(column, dtype=torch.bool), _touched(diagonal >= 0)
        # Both budgets grow by one factor; shares ascend with it, so that bisection finds the largest per head.
        largest = max(column.shape[-1] / budgets[0], diagonal.shape[-1] / budgets[1])
        low = torch.zeros(*column.shape[:2], 1, dtype=widest(column.device), device=column.device)
        high = torch.full_like(low, largest)
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            fits = _share(*_scaled(column, diagonal, budgets, sink, near, middle)) <= self.density
            low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
        return _scaled(column, diagonal, budgets, sink, near, low)


def _scaled(
    column: Tensor, diagonal: Tensor, budgets: list[int], sink: int, near: int, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """The lines kept at `factor` `[B, H, 1]` times the budgets; see `VerticalSlash._lines`."""
    return (
        column < (factor * budgets[0]).floor().clamp(min=sink),
        _touched(diagonal < (factor * budgets[1]).floor().clamp(min=near)),
    )


def _touched(bins: Tensor) -> Tensor:
    """Distances I - J of blocks that hold a kept diagonal, bool `[B, H, 2 n - 1]`, from bins `[B, H, 2 n]`.

    The tokens of a pair of blocks are between (I - J - 1) * block and (I - J + 1) * block apart: two bins.
    """
    return bins[..., 1:] | bins[..., :-1]


def _share(column: Tensor, touched: Tensor) -> Tensor:
    """Share of the pairs of blocks on a kept column or diagonal, fp64 `[B, H, 1]`, without their mask."""
    count = column.shape[-1]
    index = torch.arange(count, device=column.device)
    # Rows of column J on a kept diagonal: distances from -J to n - 1 - J.
    ends = F.pad(touched.long().cumsum(-1), (1, 0))
    on_diagonal = ends[..., 2 * count - 1 - index] - ends[..., count - 1 - index]
    kept = torch.where(column, count, on_diagonal).sum(-1, keepdim=True)
    return widened(kept) / count**2


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
    pairs = to_device(bins.bincount(minlength=2 * blocks.count).clamp(min=1), q.device)
    bins = to_device(bins, q.device)
    columns, diagonals = [], []
    for _, logits in sampled_logits(q, k, rows, layout):
        mass = logits.softmax(-1)[..., layout.video_slice()]
        columns.append(block_sums(mass.sum(2), blocks))
        sums = mass.new_zeros(*mass.shape[:2], 2 * blocks.count)
        diagonals.append(sums.index_add_(-1, bins, mass.flatten(2)) / pairs)
    return torch.cat(columns, 1), torch.cat(diagonals, 1)


def _ranks(scores: Tensor, forced: Tensor) -> Tensor:
    """Place of each entry of `scores` `[B, H, n]`, the best first, but after the forced `[n]`; ties: lower index."""
    ranked = scores.masked_fill(forced, torch.inf).argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(ranked).scatter_(
        -1, ranked, torch.arange(scores.shape[-1], device=scores.device).expand_as(ranked)
    )


def _real_blocks(blocks: Blocking, layout: TokenLayout, device: torch.device) -> Tensor:
    """Bool `[B or 1, 1, 1, n]`: blocks that hold a real token."""
    lengths = to_device(torch.tensor(layout.valid or (layout.tokens,)), device).view(-1, 1, 1, 1)
    return blocks.on(device)[0] < lengths
