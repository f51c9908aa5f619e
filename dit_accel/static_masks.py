"""Orders, blockings and block masks that depend on the layout alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order
from dit_accel.plan import Blocking


def outer(axes: Sequence[Tensor]) -> Tensor:
    """Kronecker product of three bool matrices, `[n, n]` over the tile raster."""
    return reduce(torch.kron, (axis.to(torch.uint8) for axis in axes)).bool()


def with_text(layout: TokenLayout, blocks: Blocking, video: Tensor, k_blocks: Blocking | None = None) -> Tensor:
    """The block mask of the video inside that of the sequence: text attends all, all attend it.

    Args:
        layout: token geometry.
        blocks: partition of the queries.
        video: bool `[nq_video, nk_video]`.
        k_blocks: partition of the keys. Default: that of the queries.

    Returns:
        Bool `[nq, nk]`.
    """
    if not layout.text:
        return video
    q_text, k_text = (layout.text_blocks(b) for b in (blocks, blocks if k_blocks is None else k_blocks))
    mask = torch.ones(len(q_text), len(k_text), dtype=torch.bool)
    mask[~q_text.unsqueeze(-1) & ~k_text] = video.flatten()
    return mask


def with_prefix(
    layout: TokenLayout, blocks: Blocking, video: Tensor, k_blocks: Blocking | None = None, causal: bool = False
) -> Tensor:
    """The block mask of the video in which all see the conditioning frames, which stand first in it.

    Args:
        layout: token geometry.
        blocks: partition of the queries.
        video: bool `[nq_video, nk_video]`.
        k_blocks: partition of the keys. Default: that of the queries. A block that begins in these frames counts.
        causal: the conditioning frames themselves see no more than `video` says.

    Returns:
        Bool `[nq_video, nk_video]`.
    """
    end = layout.prefix
    seen = spans(blocks if k_blocks is None else k_blocks, layout)[0] < end
    sees = spans(blocks, layout)[0] >= (end if causal else 0)
    return video | (sees.unsqueeze(-1) & seen)


def band(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Bool `[nq, nk]`: block pairs that hold some coordinates i, j with |i - j| <= `width`.

    Args:
        queries, keys: first and last coordinate of each block, int64 `[n]` each.
        width: half-width of the band in tokens.
    """
    first_q, last_q = (x.unsqueeze(-1) for x in queries)
    first_k, last_k = keys
    return (first_k - last_q <= width) & (first_q - last_k <= width)


def inside_band(queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], width: int) -> Tensor:
    """Bool `[nq, nk]`: block pairs of which all coordinates i, j have |i - j| <= `width`; arguments as in `band`."""
    first_q, last_q = (x.unsqueeze(-1) for x in queries)
    first_k, last_k = keys
    return (last_k - first_q <= width) & (last_q - first_k <= width)


def spans(blocks: Blocking, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """First and last video token of each video block, counted in the order of the blocks, int64 `[n]` each."""
    video = ~layout.text_blocks(blocks)
    first = blocks.starts[:-1][video] - layout.video_start
    return first, first + blocks.lengths[video] - 1


def half_width(layout: TokenLayout, density: float, rounding: str = "none") -> int:
    """Half-width w of the band |i - j| <= w whose area is `density` of all token pairs (arXiv 2502.01776).

    The rows and columns of text are counted in the area. 1.0 means everything.

    Args:
        layout: token geometry.
        density: kept share of the token pairs.
        rounding: "none"; "up" to a multiple of 128 (released for Wan and Cosmos); "down" to a multiple of 128, and
            |i - j| < w instead (released for HunyuanVideo and CogVideoX).
    """
    if density == 1:
        return layout.tokens
    area = max(0.0, density - 2 * layout.text / layout.tokens)
    width = layout.tokens * (1 - math.sqrt(1 - area))
    if rounding == "up":
        return math.ceil(width / 128) * 128
    if rounding == "down":
        return max(0, math.floor(width / 128) * 128 - 1)
    return math.floor(width)


def frame_blocks(layout: TokenLayout, size: int) -> Blocking:
    """Blocks of `size` tokens of which none crosses the border of a frame."""
    return layout.blocks(size, video=Blocking.segments([layout.frame_tokens] * layout.frames, size))


def token_major(layout: TokenLayout, leading: int = 0) -> TokenOrder:
    """Video tokens place by place, the frames of a place together; text stays in place.

    Args:
        layout: token geometry.
        leading: frames that stay where they are, before the others. Default 0.
    """
    start = leading * layout.frame_tokens
    rest = torch.arange(start, layout.video).view(-1, layout.frame_tokens).T.flatten()
    return video_order(layout, torch.cat([torch.arange(start), rest]))


def token_major_places(layout: TokenLayout, leading: int = 0) -> Tensor:
    """place * frames + frame of the video tokens as they stand in `token_major`, int64 `[video]`, leading ones too."""
    token = token_major(layout, leading).query[layout.video_slice()] - layout.video_start
    return token % layout.frame_tokens * layout.frames + token // layout.frame_tokens
