"""Three-dimensional tiles: tokens that are near each other in the video become blocks, on any grid."""

from __future__ import annotations

from functools import lru_cache

import torch

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order
from dit_accel.plan import Blocking

Triple = tuple[int, int, int]
_EACH: Triple = (1, 1, 1)


def axis_tiles(length: int, tile: int, dilation: int = 1) -> torch.Tensor:
    """Index of the tile that holds each coordinate of an axis, int64 `[length]`.

    Args:
        length: coordinates on the axis.
        tile: coordinates per tile; the last tile of a dilation group may hold fewer.
        dilation: a tile holds coordinates that are this far apart: those of one dilation group, x mod dilation.
    """
    x = torch.arange(length)
    groups = torch.arange(dilation)
    per_group = -(-(length // dilation + (groups < length % dilation).long()) // tile)
    return (per_group.cumsum(0) - per_group)[x % dilation] + x // dilation // tile


@lru_cache(maxsize=16)
def tile_order(layout: TokenLayout, tile: Triple, dilation: Triple = _EACH) -> TokenOrder:
    """Video tokens tile by tile, in raster order inside a tile and between tiles; text stays in place.

    Args:
        layout: token geometry.
        tile: (frames, height, width) of a tile in tokens. Tiles at the end of an axis are smaller.
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
    for axis in map(axis_tiles, layout.grid, tile, dilation):
        index = (index.unsqueeze(-1) * (int(axis.max()) + 1) + axis).flatten()
    return index
