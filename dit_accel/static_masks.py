"""Parts of block masks that depend on the layout alone, `[n, n]` bool over blocks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking


def outer(axes: Sequence[Tensor]) -> Tensor:
    """Kronecker product of three bool matrices, `[n, n]` over the tile raster."""
    return reduce(torch.kron, (axis.to(torch.uint8) for axis in axes)).bool()


def with_text(layout: TokenLayout, blocks: Blocking, video: Tensor) -> Tensor:
    """The block mask `[n_video, n_video]` of the video inside that of the sequence: text attends all, all attend it."""
    if not layout.text:
        return video
    text = layout.text_blocks(blocks)
    mask = torch.ones(blocks.count, blocks.count, dtype=torch.bool)
    mask[~text.unsqueeze(-1) & ~text] = video.flatten()
    return mask
