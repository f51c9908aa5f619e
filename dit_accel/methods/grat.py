"""Grouped attention: whole groups of the grid attend their neighbours (B) or the groups in line with them (X)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Count, Density, Method, SizeTriple
from dit_accel.methods.neighborhood import Axis
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.tiles import tile_blocks, tile_counts, tile_order
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext
from dit_accel.static_masks import outer, with_prefix, with_text

_ROUNDING = 1e-9
_TOKENS = 32, 1024  # smaller groups waste the matrix unit, larger ones are no blocks


@register("grat")
class Grat(Method):
    """Grouped attention (arXiv 2505.14687): all queries of a group share one set of whole key groups.

    Published, without training: HunyuanVideo X with tile [4, 8, 8], FLUX.1-dev at 8192 x 8192 tile [1, 16, 16] with
    reach 1; no dense steps. Pays from about 2K images or 60 thousand video tokens on.

    Args:
        pattern: "X": groups that share a coordinate with the query's; "B": groups at most `reach` away on every axis,
            the box shifted inward at borders (our choice: every group has equally many keys, as in sliding tiles).
        cross: what X keeps of a video. "planes": groups that share at least one coordinate (released code); "lines":
            groups that differ in one coordinate at most. The same on an image.
        tile: (frames, height, width) of a group in tokens. Groups at the end of an axis may be smaller.
        reach: groups to each side for B. Default 1.
        ring: X keeps the groups of B as well, so that no corner is cut off (ours). Default False.
        density: the most that the pattern may keep of the pairs of groups, as far as it goes. B takes the largest
            `reach`; X the largest tile of the shape of `tile` with 32 to 1024 tokens (ours). Default None: `tile` and
            `reach` decide.

    Conditioning frames are groups of their own, seen by all.
    """

    source: ClassVar[str] = "arXiv 2505.14687"
    is_static: ClassVar[bool] = True

    pattern: Literal["X", "B"] = "X"
    cross: Literal["planes", "lines"] = "planes"
    tile: SizeTriple = (4, 8, 8)
    reach: Count = 1
    ring: bool = False
    density: Density | None = None

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Group by group."""
        return tile_order(call.layout, self._fitted(call.layout).tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The groups of the pattern. q, k `[B, H, N, D]` are not looked at; text attends all and is attended by all."""
        layout, fitted = call.layout, self._fitted(call.layout)
        blocks = tile_blocks(layout, fitted.tile)
        mask = with_prefix(layout, blocks, fitted.groups_seen(layout))
        return BlockPlan.from_mask(with_text(layout, blocks, mask), blocks, blocks)

    def groups_seen(self, layout: TokenLayout) -> Tensor:
        """Bool `[n, n]` over the groups of the video."""
        if self.density == 1:
            return torch.ones((math.prod(tile_counts(layout, self.tile)),) * 2, dtype=torch.bool)
        counts = tile_counts(layout, self.tile)
        box = outer([Axis(n, min(n, 2 * self.reach + 1), 1, 1, False).kept() for n in counts])
        mask = box if self.pattern == "B" else self._cross(layout, counts)
        return mask | box if self.ring else mask

    def _fitted(self, layout: TokenLayout) -> Grat:
        """The pattern that keeps `density` at most."""
        if self.density in (None, 1):
            return self
        options = self._options(layout)
        fitting = [option for option in options if option.share(layout) <= self.density + _ROUNDING]
        return fitting[-1] if fitting else min(options, key=lambda option: option.share(layout))

    def share(self, layout: TokenLayout) -> float:
        """Share of the pairs of groups that `tile` and `reach` keep, without conditioning frames.

        A pair of groups agrees on an axis or not, whatever it does on the others, so the shares of axes multiply.
        """
        counts = tile_counts(layout, self.tile)
        near = [min(n, 2 * self.reach + 1) / n for n in counts]
        box = math.prod(near)
        if self.pattern == "B":
            return box
        equal = [1 / n for n in counts]
        if layout.frames == 1:
            near, equal = near[1:], equal[1:]
        crossed = self._crossed([1.0] * len(equal), equal)
        return crossed + box - self._crossed(near, equal) if self.ring else crossed

    def _crossed(self, near: list[float], equal: list[float]) -> float:
        """Share of X among the pairs that are near on all axes, for the shares of near and equal pairs per axis."""
        apart = [a - b for a, b in zip(near, equal, strict=True)]
        if self.cross == "planes":
            return math.prod(near) - math.prod(apart)
        line = math.prod(equal)
        return line + sum(line / b * a for a, b in zip(apart, equal, strict=True))

    def _options(self, layout: TokenLayout) -> list[Grat]:
        """Patterns to choose from, sparse to dense."""
        if self.pattern == "B":
            return [self.model_copy(update={"reach": reach}) for reach in range(max(tile_counts(layout, self.tile)))]
        longest, options = max(self.tile), {}
        for size in range(1, 33):
            tile = tuple(max(1, round(n * size / longest)) for n in self.tile)
            tokens = math.prod(map(min, tile, layout.grid))
            if _TOKENS[0] <= tokens <= _TOKENS[1]:
                options[tile] = self.model_copy(update={"tile": tile})
        return list(options.values()) or [self]

    def _cross(self, layout: TokenLayout, counts: list[int]) -> Tensor:
        """Bool `[n, n]`: groups that share enough coordinates; an image has two."""
        at = torch.cartesian_prod(*(torch.arange(count) for count in counts))
        at = at[:, 1:] if layout.frames == 1 else at
        shared = (at.unsqueeze(1) == at).sum(-1)
        return shared >= (1 if self.cross == "planes" else at.shape[1] - 1)
