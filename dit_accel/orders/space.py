"""Orders that depend on the grid alone: nothing to compute per call, and the same for all heads unless said.

All keep text in place. Tiles are in `tiles.py`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order

Axes = Literal["fhw", "fwh", "hfw", "hwf", "wfh", "whf"]
# A side of a box: how far its tokens are apart in the raster, negative where it runs backwards, and how many they are.
Side = tuple[int, int]


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
def hilbert_order(layout: TokenLayout) -> TokenOrder:
    """Along a Hilbert curve generalised to boxes of any sides: every step leads to a token that touches.

    Source: the recursion called Gilbert (J. Červený), used by arXiv 2502.18137, 2508.10774 and 2512.04025.
    """
    frames, height, width = layout.grid
    sides = [(1, width), (width, height), (height * width, frames)]
    # It starts along the longest side, of equal ones along the one that runs fastest in the raster.
    along, across, up = sorted(sides, key=lambda side: -side[1])
    index, todo = list[int](), [(0, along, across, up)]
    while todo:
        at, a, b, c = todo.pop()
        line = next((side for side in (a, b, c) if side[1] == a[1] * b[1] * c[1]), None)
        if line is None:
            # The last part put on the pile is the next one taken from it.
            todo += reversed(_hilbert_parts(at, a, b, c))
        else:
            index += range(at, at + line[0] * line[1], line[0])
    return video_order(layout, torch.tensor(index))


def _hilbert_parts(at: int, a: Side, b: Side, c: Side) -> list[tuple[int, Side, Side, Side]]:
    """The parts of a box in the order in which the curve passes them, each as its first corner and its sides.

    The curve enters a box at the corner `at` and leaves it at the far end of `a`.
    """
    (step_a, long_a), (step_b, long_b), (step_c, long_c) = a, b, c
    (half_a, rest_a), (half_b, rest_b), (half_c, rest_c) = (_halves(side) for side in (a, b, c))
    last_a, last_c = step_a * (long_a - 1), step_c * (long_c - 1)
    middle_b, middle_c = step_b * half_b[1], step_c * half_c[1]
    if 2 * long_a > 3 * max(long_b, long_c):
        return [(at, half_a, b, c), (at + step_a * half_a[1], rest_a, b, c)]
    if 3 * long_b > 4 * long_c:
        back = at + last_a + middle_b - step_b
        return [(at, half_b, c, half_a), (at + middle_b, a, rest_b, c), (back, _turned(half_b), c, _turned(rest_a))]
    if 3 * long_c > 4 * long_b:
        back = at + last_a + middle_c - step_c
        return [(at, half_c, half_a, b), (at + middle_c, a, b, rest_c), (back, _turned(half_c), _turned(rest_a), b)]
    return [
        (at, half_b, half_c, half_a),
        (at + middle_b, c, half_a, rest_b),
        (at + middle_b - step_b + last_c, a, _turned(half_b), _turned(rest_c)),
        (at + last_a + middle_b + last_c, _turned(c), _turned(rest_a), rest_b),
        (at + last_a + middle_b - step_b, _turned(half_b), half_c, _turned(rest_a)),
    ]


def _halves(side: Side) -> tuple[Side, Side]:
    """Two halves, the first of even length where it can be: the curve leaves an odd one by a diagonal step."""
    step, length = side
    half = length // 2 + (length // 2 % 2 if length > 2 else 0)
    return (step, half), (step, length - half)


def _turned(side: Side) -> Side:
    return -side[0], side[1]


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
