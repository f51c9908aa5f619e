"""Three-dimensional tiles: tokens that are near each other in the video become blocks, on any grid."""

from __future__ import annotations

from functools import lru_cache

import torch

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order
from dit_accel.plan import Blocking


@lru_cache(maxsize=16)
def tile_order(layout: TokenLayout, tile: tuple[int, int, int]) -> TokenOrder:
    """Video tokens tile by tile, in raster order inside a tile and between tiles; text stays in place.

    Args:
        layout: token geometry.
        tile: (frames, height, width) of a tile in tokens. Tiles at the end of an axis are smaller.
    """
    tile_of, place = _tile_of_token(layout, tile)
    return video_order(layout, torch.argsort(tile_of * layout.video + place, stable=True))


@lru_cache(maxsize=16)
def tile_blocks(layout: TokenLayout, tile: tuple[int, int, int]) -> Blocking:
    """One block per tile, in the order of `tile_order`; text is cut into blocks of a tile's size."""
    tile_of, _ = _tile_of_token(layout, tile)
    return layout.blocks(tile[0] * tile[1] * tile[2], video=Blocking.from_lengths(tile_of.bincount()))


def _tile_of_token(layout: TokenLayout, tile: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of the tile of every video token, and its raster index, int64 `[video]`."""
    at = layout.coordinates.long() // torch.tensor(tile)
    counts = [-(-size // step) for size, step in zip(layout.grid, tile, strict=True)]
    index = (at[:, 0] * counts[1] + at[:, 1]) * counts[2] + at[:, 2]
    return index, torch.arange(layout.video)
