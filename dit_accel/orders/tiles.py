"""Three-dimensional tiles: tokens that are near each other in the video become blocks, on any grid."""

from __future__ import annotations

from functools import lru_cache

import torch

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order
from dit_accel.plan import Blocking

Triple = tuple[int, int, int]
_EACH: Triple = (1, 1, 1)


def axis_tiles(length: int, tile: int, dilation: int = 1, leading: int = 0) -> torch.Tensor:
    """Index of the tile that holds each coordinate of an axis, int64 `[length]`.

    Args:
        length: coordinates on the axis.
        tile: coordinates per tile; the last tile of a dilation group may hold fewer.
        dilation: a tile holds coordinates that are this far apart: those of one dilation group, x mod dilation.
        leading: coordinates at the start that share no tile with the others, and are not dilated. Default 0.
    """
    if leading:
        first = torch.arange(leading) // tile
        return torch.cat([first, axis_tiles(length - leading, tile, dilation) + first[-1] + 1])
    x = torch.arange(length)
    groups = torch.arange(dilation)
    per_group = -(-(length // dilation + (groups < length % dilation).long()) // tile)
    return (per_group.cumsum(0) - per_group)[x % dilation] + x // dilation // tile


def tile_axes(layout: TokenLayout, tile: Triple, dilation: Triple = _EACH) -> list[torch.Tensor]:
    """Index of the tile of every coordinate, int64 `[L]` per axis; conditioning frames stand in tiles of their own."""
    leading = (layout.prefix_frames, 0, 0)
    return [axis_tiles(*axis) for axis in zip(layout.grid, tile, dilation, leading, strict=True)]


def tile_counts(layout: TokenLayout, tile: Triple) -> list[int]:
    """Number of tiles per axis."""
    return [int(axis[-1]) + 1 for axis in tile_axes(layout, tile)]


@lru_cache(maxsize=16)
def tile_order(layout: TokenLayout, tile: Triple, dilation: Triple = _EACH) -> TokenOrder:
    """Video tokens tile by tile, in raster order inside a tile and between tiles; text stays in place.

    Args:
        layout: token geometry.
        tile: (frames, height, width) of a tile in tokens. Tiles at the end of an axis are smaller, and so may be those
            of conditioning frames, which stand first and share no tile with the other frames.
        dilation: distance of neighbours in a tile per axis, so that a dilated window meets whole tiles. Default 1.
    """
    return video_order(layout, torch.argsort(_tile_of_token(layout, tile, dilation), stable=True))


@lru_cache(maxsize=16)
def tile_blocks(layout: TokenLayout, tile: Triple, dilation: Triple = _EACH) -> Blocking:
    """One block per tile, in the order of `tile_order`; text is cut into blocks of the largest tile's size."""
    lengths = _tile_of_token(layout, tile, dilation).bincount()
    return layout.blocks(int(lengths.max()), video=Blocking.from_lengths(lengths))


def _tile_of_token(layout: TokenLayout, tile: Triple, dilation: Triple) -> torch.Tensor:
    """Index of the tile of every video token, int64 `[video]`."""
    index = torch.zeros(1, dtype=torch.int64)
    for axis in tile_axes(layout, tile, dilation):
        index = (index.unsqueeze(-1) * (int(axis.max()) + 1) + axis).flatten()
    return index
