"""Radial attention: a diagonal band per frame pair whose width halves when the frame distance doubles.

f frames of s tokens each, in raster order; D = |i - j| is the distance of frames i and j; b the block size.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import FROM_LIST, BlockSize, Density, Method
from dit_accel.methods.registry import register
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext

_NO_BAND = -1
_FLOOR = 128  # the released code thins frames out below this width, whatever the block size
_SEARCH_STEPS = 12

Width = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]


@register("radial")
class Radial(Method):
    """Radial attention (arXiv 2506.19852), one static plan for all heads.

    Published at 768 x 1280 (decay, block, dense steps, dense layers): Wan2.1-14B 0.2, 128, 12 of 50, 1; with an 8-step
    LoRA 2 dense steps, with a 4-step LoRA 1; Wan2.2-A14B 0.8, 64, 11 of 40, 1 per expert; HunyuanVideo 0.95, 128, 12
    of 50, 0, without sink. On one frame it is dense.

    Args:
        variant: "released": the mask that the published code runs; "paper": the mask of the paper's equation 4, with
            `decay` as a factor on the width of all other frames (1 in the paper), which the floors of the released
            rule do not stop; "blocks": the rule of LightX2V in units of blocks, with `widths`.
        decay: factor on the band width of distant frames ("blocks": of all other frames). Default 1.
        density: choose the largest `decay` whose plan is not denser than this, as far as the rule goes: frames at
            distance 0 and 1 and the sink stay. Default None: `decay` decides.
        block: block size in tokens. Default 64; published settings use 64 or 128.
        sink: every query attends the whole first frame, and all conditioning frames. Default True (Wan); the released
            HunyuanVideo code has none.
        neighbor: band width of adjacent frames as a share of the frame. Default 1 (dense); LightX2V uses 0.5.
        widths: for "blocks", half-width at frame distance 0, 1, 2, ... as a share of the frame; beyond them, and where
            they are narrower, `least` blocks. LightX2V: [1, 0.5, 0.056] and 1 by default, [1, 0.5, 0.25, 0.25] and 2
            for Wan.
        least: smallest half-width for "blocks", in blocks. Default 1.
        block_rule: when a block counts as kept. "column": more than 60 % of the columns that the band touches have
            over a third of their rows in it (released code; not a superset of the token mask); "any": the band
            touches it (a superset). Default: "column" for "released", "any" for "paper". Without meaning for "blocks".
    """

    source: ClassVar[str] = "arXiv 2506.19852"
    is_static: ClassVar[bool] = True

    variant: Literal["released", "paper", "blocks"] = "released"
    decay: Width = 1.0
    density: Density | None = None
    block: BlockSize = 64
    sink: bool = True
    neighbor: Share = 1.0
    widths: Annotated[tuple[Share, ...], FROM_LIST, Field(min_length=1)] = (1.0, 0.5, 0.056)
    least: Width = 1.0
    block_rule: Literal["column", "any"] | None = None

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The band plan. q, k `[B, H, N, D]` are not looked at; text blocks are attended by all and attend all."""
        layout = call.layout
        blocks = layout.blocks(self.block)
        mask = torch.ones(blocks.count, blocks.count, dtype=torch.bool)
        video = ~layout.text_blocks(blocks)
        mask[video.unsqueeze(1) & video] = torch.from_numpy(self._video_mask(layout)).flatten()
        return BlockPlan.from_mask(mask, blocks, blocks)

    def _video_mask(self, layout: TokenLayout) -> np.ndarray:
        if self.density is None:
            return self._mask(layout, self.decay)
        if self.density == 1:
            return np.ones((-(-layout.video // self.block),) * 2, dtype=bool)
        low, high = 0.0, 4.0
        best = self._mask(layout, low)
        for _ in range(_SEARCH_STEPS):
            middle = (low + high) / 2
            mask = self._mask(layout, middle)
            if mask.mean() <= self.density:
                low, best = middle, mask
            else:
                high = middle
        return best

    def _mask(self, layout: TokenLayout, decay: float) -> np.ndarray:
        """Bool block mask `[n, n]` of the video part."""
        if self.variant == "blocks":
            return self._block_widths(layout, decay)
        frames, size = layout.frames, layout.frame_tokens
        count = -(-layout.video // self.block)
        mask = np.zeros((count, count), dtype=bool)
        # Frame pairs with the same width and the same place in the block raster have the same blocks.
        tiles: dict[tuple[int, int, int], np.ndarray] = {}
        for i in range(frames):
            for j in range(frames):
                width = size if j < self._sink_frames(layout) else self.half_width(abs(i - j), size, decay)
                if width == _NO_BAND:
                    continue
                at = (width, i * size % self.block, j * size % self.block)
                if at not in tiles:
                    tiles[at] = self._band_blocks(size, *at)
                row, column = i * size // self.block, j * size // self.block
                view = mask[row : row + tiles[at].shape[0], column : column + tiles[at].shape[1]]
                view |= tiles[at]
        self._keep_borders(mask, layout.video)
        return mask

    def _keep_borders(self, mask: np.ndarray, tokens: int) -> None:
        """The ragged tail is kept whole, as upstream does; so is every block's own diagonal, or thin frames vanish."""
        np.fill_diagonal(mask, True)
        if tokens % self.block:
            mask[-1, :] = True
            mask[:, -1] = True

    def half_width(self, distance: int, size: int, decay: float) -> int:
        """Half-width w of the band |k - l| <= w between frames at `distance`, in tokens; -1: the pair is dropped."""
        if distance == 0:
            return size
        if self.variant == "paper":
            return _paper_half_width(distance, decay * (size if distance > 1 else self.neighbor * size))
        if distance == 1:
            return size if self.neighbor == 1 else int(self.neighbor * size)
        width = 2.0 ** size.bit_length() / 2.0 ** distance.bit_length()
        if width < _FLOOR and distance % int(_FLOOR // width) != 0:
            return _NO_BAND
        return int(max(decay * width, self.block))

    def _sink_frames(self, layout: TokenLayout) -> int:
        return max(1, layout.prefix_frames) if self.sink else layout.prefix_frames

    def _block_widths(self, layout: TokenLayout, decay: float) -> np.ndarray:
        """Bool block mask `[n, n]` of "blocks": the place of a block in its frame is compared, a frame being s / b."""
        per_frame = layout.frame_tokens / self.block
        shares = [share * (decay if i else 1) for i, share in enumerate(self.widths[: layout.frames])]
        wide = [max(self.least, share * per_frame) for share in shares]
        width = np.array(wide + [self.least] * (layout.frames - len(wide)))
        start = np.arange(-(-layout.video // self.block)) * self.block
        frame, index = start // layout.frame_tokens, np.arange(len(start))
        frames_apart = abs(frame[:, None] - frame)
        blocks_apart = abs(index[:, None] - index)
        mask = abs(blocks_apart - frames_apart * per_frame) <= width[frames_apart]
        # A block that begins with a frame also ends the one before it.
        at_border = np.where(
            index[:, None] > index, (start % layout.frame_tokens == 0)[:, None], start % layout.frame_tokens == 0
        )
        before = np.maximum(frames_apart - 1, 0)
        mask |= at_border & (frames_apart > 0) & (abs(blocks_apart - before * per_frame) <= width[before])
        return mask | (start <= self._sink_frames(layout) * layout.frame_tokens) & (self._sink_frames(layout) > 0)

    def _band_blocks(self, size: int, width: int, row_offset: int, column_offset: int) -> np.ndarray:
        """Which blocks the band of one frame pair keeps, the frame standing at the given offsets in its first block."""
        block = self.block
        column = np.arange(size)
        first = np.arange(0, row_offset + size, block) - row_offset
        top, bottom = np.maximum(first, 0), np.minimum(first + block, size)
        # Rows of each block row that the band keeps in each column.
        rows = np.minimum(column + width, bottom[:, None] - 1) - np.maximum(column - width, top[:, None]) + 1
        starts = np.maximum(np.arange(0, column_offset + size, block) - column_offset, 0)
        touched = np.add.reduceat(rows > 0, starts, axis=1, dtype=np.int32)
        rule = self.block_rule or ("column" if self.variant == "released" else "any")
        if rule == "any":
            return touched > 0
        well_kept = np.add.reduceat(rows > block / 3, starts, axis=1, dtype=np.int32)
        return well_kept / (touched + 1e-9) > 0.6


def _paper_half_width(distance: int, size: float) -> int:
    """Equation 4: |k - l| + 1 <= s / 2^r, r = floor(log2 D); beyond that, the diagonal of every m-th frame."""
    reach = 2 ** int(math.log2(distance))
    if reach <= size:
        return math.floor(size / reach) - 1
    return 0 if size > 0 and distance % math.ceil(reach / size) == 0 else _NO_BAND
