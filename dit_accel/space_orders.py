"""Orders that depend on the grid alone: nothing to compute per call, and the same for all heads unless said.

All keep text in place. Tiles are in `tiling.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order

Axes = Literal["fhw", "fwh", "hfw", "hwf", "wfh", "whf"]


@lru_cache(maxsize=16)
def morton_order(layout: TokenLayout) -> TokenOrder:
    """Along the Z-order curve: the bits of frame, row and column interleaved, the column's lowest; any grid."""
    at = layout.coordinates.long()
    code = torch.zeros(layout.video, dtype=torch.int64)
    for bit in range(max(layout.grid).bit_length()):
        for place, axis in enumerate((2, 1, 0)):
            code |= (at[:, axis] >> bit & 1) << (3 * bit + place)
    return video_order(layout, code.argsort())


@lru_cache(maxsize=16)
def bisection_order(layout: TokenLayout, block: int, shape: tuple[int, int, int]) -> TokenOrder:
    """Boxes of exactly `block` tokens on any grid, by cutting the video in two again and again.

    A cut goes between two planes where that leaves whole blocks on both sides and neither is under a third, across
    the longest side that has such a place; else through a plane, at the middle of the longest side. Unlike tiles, no
    box at an edge is smaller, so no block is padded.

    Args:
        layout: token geometry.
        block: tokens per box; only the last may hold fewer.
        shape: how long the sides (frames, height, width) of a box should be in proportion.
    """
    at = layout.coordinates.long()
    done, todo = [], [torch.arange(layout.video)]
    while todo:
        part = todo.pop()
        if len(part) <= block:
            done.append(part)
            continue
        axis, left = _cut(at[part], block, shape)
        # A stable sort keeps the raster's order within a plane.
        part = part[at[part, axis].argsort(stable=True)]
        # The last part put on the pile is the next one taken from it.
        todo += [part[left:].sort().values, part[:left].sort().values]
    return video_order(layout, torch.cat(done))


def _cut(at: Tensor, block: int, shape: tuple[int, int, int]) -> tuple[int, int]:
    """Across which axis to cut the tokens at `at` `[n, 3]`, and how many (whole blocks) stand before it."""
    count = len(at)
    extent = (at.amax(0) - at.amin(0) + 1).double() / torch.tensor(shape)
    axes = extent.argsort(descending=True, stable=True).tolist()
    for axis in axes:
        planes = at[:, axis].bincount().cumsum(0)
        places = planes[(planes % block == 0) & (3 * planes >= count) & (3 * planes <= 2 * count)]
        if len(places):
            return axis, int(places[(2 * places - count).abs().argmin()])
    return axes[0], -(-count // block) // 2 * block


@lru_cache(maxsize=64)
def axes_order(layout: TokenLayout, axes: tuple[Axes, ...]) -> TokenOrder:
    """The raster with its axes in another order, the last one running fastest (arXiv 2506.16054).

    Args:
        layout: token geometry.
        axes: one order of the axes for all heads, or one per head.
    """
    index = torch.stack([_raster(layout, order) for order in axes])
    return video_order(layout, index[0] if len(axes) == 1 else index.unsqueeze(0))


def _raster(layout: TokenLayout, axes: Axes) -> Tensor:
    """Token indices int64 `[video]` in the raster over `axes`."""
    return torch.arange(layout.video).view(layout.grid).permute(["fhw".index(axis) for axis in axes]).flatten()
