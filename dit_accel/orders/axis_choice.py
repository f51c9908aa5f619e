"""Which order of the axes suits a head: the offline choice of PAROAttention (arXiv 2506.16054).

Axis legend: B batch, H heads, N tokens, V video tokens, D head size, n tiles per side.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import permute
from dit_accel.orders.space import Axes, axes_order
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import TopP, own_blocks, plan_of_mask, select_blocks
from dit_accel.selection.scores import block_sums, row_groups
from dit_accel.widest import widened, widest

AXES: tuple[Axes, ...] = get_args(Axes)
_STEPS = 20


def tile_costs(q: Tensor, k: Tensor, block: int, epsilon: float = 1e-3, share: float = 0.9) -> tuple[Tensor, Tensor]:
    """How empty and how uneven the tiles of the attention map are, without ever holding the map.

    Args:
        q, k: `[B, H, V, D]`, the video tokens in the order to judge.
        block: side of a tile.
        epsilon: weights below this count as zero.
        share: a tile is empty when at least this share of its entries is zero.

    Returns:
        Share of the tiles that are empty, in [0, 1], and mean over the tiles of largest over mean weight, at least 1;
        fp64 `[B, H]` each.
    """
    batch, heads, tokens, dim = q.shape
    blocks = Blocking.uniform(tokens, block)
    sizes = widened((blocks.lengths.unsqueeze(-1) * blocks.lengths).to(q.device))
    empty, uneven = torch.zeros(2, batch, heads, dtype=widest(q.device), device=q.device)
    for group in row_groups(blocks.count, batch * heads * block * tokens, q.device):
        rows = slice(int(blocks.starts[group.start]), int(blocks.starts[group.stop]))
        weights = (widened(q[:, :, rows]) * dim**-0.5 @ widened(k).transpose(-1, -2)).softmax(-1)
        parts = Blocking.from_lengths(blocks.lengths[group], block)
        zeros, sums = (_tiles(x, parts, blocks) for x in (widened(weights < epsilon), weights))
        peaks = torch.stack([part.amax(2) for part in weights.split(parts.lengths.tolist(), 2)], 2)
        peaks = torch.stack([part.amax(-1) for part in peaks.split(blocks.lengths.tolist(), -1)], -1)
        empty += (zeros >= share * sizes[group]).sum((-1, -2))
        uneven += (peaks * sizes[group] / sums.clamp(min=torch.finfo(sums.dtype).tiny)).sum((-1, -2))
    return empty / blocks.count**2, uneven / blocks.count**2


def _tiles(x: Tensor, rows: Blocking, columns: Blocking) -> Tensor:
    """Sums over tiles: `[B, H, R, V]` to `[B, H, r, n]`."""
    return block_sums(block_sums(x, columns).transpose(-1, -2), rows).transpose(-1, -2)


def axis_costs(q: Tensor, k: Tensor, layout: TokenLayout, block: int = 64, alpha: float = 1.0) -> Tensor:
    """Cost of each order of the axes for each head; the order to take has the smallest.

    The paper adds the share of empty tiles to the unevenness and takes the minimum, which rewards few empty tiles; here
    the share of tiles that are not empty stands in its place. Both are normalised over the six orders.

    Args:
        q, k: `[B, H, N, D]` of a recorded call, in the raster.
        layout: token geometry; text is left out.
        block: side of a tile.
        alpha: weight of emptiness (for sparse attention); the rest is that of evenness (for block-wise integers).

    Returns:
        fp64 `[H, 6]` in the order of `AXES`, the mean over the batch.
    """
    video, costs = layout.video_slice(), []
    for axes in AXES:
        index = axes_order(TokenLayout(layout.grid), (axes,)).query.to(q.device)
        empty, uneven = tile_costs(permute(q[:, :, video], index), permute(k[:, :, video], index), block)
        costs.append(torch.stack([1 - empty, uneven]).mean(1))
    both = torch.stack(costs, -1)  # [2, H, 6]
    both = both / both.sum(-1, keepdim=True).clamp(min=torch.finfo(both.dtype).tiny)
    return alpha * both[0] + (1 - alpha) * both[1]


def best_axes(costs: Tensor) -> tuple[Axes, ...]:
    """The cheapest order of each head, from `[H, 6]`; of equal ones the first."""
    return tuple(AXES[int(index)] for index in costs.argmin(-1))


def recall_plan(mass: Tensor, density: float, blocks: Blocking, layout: TokenLayout) -> BlockPlan:
    """A static plan from a recorded map: rows keep the fewest tiles that reach one recall, the highest that fits.

    The published rule for the mask is not known. Here every head has one recall, found by bisection, so that rows with
    flat attention get more tiles; its own tile and text are always kept.

    Args:
        mass: attention mass of each pair of blocks `[B, H, n, n]`, see `block_mass`; averaged over the batch.
        density: mean share of tiles per head that is not exceeded, but for those always kept.
        blocks: partition of queries and keys.
        layout: token geometry.
    """
    scores = mass.mean(0, keepdim=True).log()
    always = own_blocks(blocks, blocks).to(mass.device) | layout.text_blocks(blocks).to(mass.device)
    low, high = torch.zeros(2, scores.shape[1], dtype=widest(mass.device), device=mass.device)
    high += 1
    for _ in range(_STEPS):
        recall = (low + high) / 2
        fits = widened(_kept(scores, recall, always)).mean((0, 2, 3)) <= density
        low, high = torch.where(fits, recall, low), torch.where(fits, high, recall)
    if density >= 1:
        low = torch.ones_like(low)
    return plan_of_mask(_kept(scores, low, always), blocks, blocks, layout, ~scores.isneginf())


def _kept(scores: Tensor, recall: Tensor, always: Tensor) -> Tensor:
    return select_blocks(scores, TopP(mass=recall), always)
