"""Discs: every query sees the tiles within a radius, and all text."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit_accel.kernels import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.kernels.spec import Remainder
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Density, Method, Size, SizeTriple
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.tiles import tile_axes, tile_blocks, tile_order
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate
from dit_accel.remainders.partial import PartialAttention
from dit_accel.state import CallContext
from dit_accel.static_masks import with_prefix, with_text

_TRAINED_TOKENS = 64 * 64 + 512  # FLUX at 1024 x 1024, with its text


@register("clear")
class Clear(Method):
    """CLEAR (arXiv 2412.16112): a disc around each query, cut at the borders; made for FLUX with fine-tuned weights.

    A disc in raster order touches whole rows of keys; in tiles it is compact, and only the tiles at its rim are decided
    token by token. Without the published weights it holds up in upscaling and at radius 32 or more. Published radii: 8,
    16, 32, tiles of FLUX.1-dev, no dense steps. Conditioning frames are seen by all.

    Args:
        radius: a key is seen when its distance is below `radius`, in tokens.
        density: the largest radius that keeps no more than this share of the tile pairs; every tile keeps itself.
            Default None: `radius` decides.
        rim: tiles that a disc only touches: "exact": its tokens alone, as published; "whole": all of them, which
            attends more and is cheaper, since no token is masked. Default: "exact"; "whole" with `density`, which
            counts tiles, and with remainder "mean", which has no place for the rest of a tile.
        frame_step: distance of neighbouring frames, in tokens. 1 gives the published densities of balls in video; 0 is
            a disc through all frames.
        remainder: "drop"; "mean": tiles outside the disc enter as one mean key and value each, with their log-count
            (ours); "pooled": all cells of `pool` x `pool` tokens, near ones too, enter as one mean key and value of the
            weight of one token, for image queries alone (as published, before training).
        pool: side of a cell in tokens, for "pooled". Published: 4.
        proportional: scale the logits by sqrt(log n / log n0) for n tokens, n0 = 4608, as the authors do beyond 1024 x
            1024. Dense calls do not.
        tile: (frames, height, width) of a block in tokens.
    """

    source: ClassVar[str] = "arXiv 2412.16112"
    is_static: ClassVar[bool] = True

    radius: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 16.0
    density: Density | None = None
    rim: Literal["exact", "whole"] | None = None
    frame_step: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    remainder_: Literal["drop", "mean", "pooled"] = Field(default="drop", alias="remainder")
    pool: Size = 4
    proportional: bool = False
    tile: SizeTriple = (1, 8, 8)

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Tile by tile."""
        return tile_order(call.layout, self.tile)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The tiles that a disc touches. q, k `[B, H, N, D]` are not looked at; text attends all, all attend it."""
        layout = call.layout
        blocks = tile_blocks(layout, self.tile)
        near = self._squared_distances(layout, _nearest)
        limit = self._squared_radius(near)
        touched = with_text(layout, blocks, with_prefix(layout, blocks, near < limit))
        if self._rim == "whole":
            return BlockPlan.from_mask(touched, blocks, blocks)
        inside = with_prefix(layout, blocks, self._squared_distances(layout, _farthest) < limit)
        return BlockPlan.from_mask(
            touched, blocks, blocks, with_text(layout, blocks, inside), self._predicate(layout, limit)
        )

    def tiles_seen(self, layout: TokenLayout) -> Tensor:
        """The tiles that a disc touches, bool `[n, n]` over the tiles of the video."""
        near = self._squared_distances(layout, _nearest)
        return near < self._squared_radius(near)

    @property
    def _rim(self) -> str:
        counts_tiles = self.density is not None or self.remainder_ == "mean"
        return self.rim or ("whole" if counts_tiles else "exact")

    def _squared_distances(self, layout: TokenLayout, gap: Callable[[Tensor], Tensor]) -> Tensor:
        """Squared distance of tiles, fp32 `[n, n]`, where `gap` gives that of each two tiles of an axis."""
        t, h, w = (gap(axis).square().float() for axis in tile_axes(layout, self.tile))
        plane = (self._weight * t)[:, None, :, None] + h[None, :, None, :]
        squared = plane[:, :, None, :, :, None] + w[None, None, :, None, None, :]
        return squared.flatten(3).flatten(0, 2)

    @property
    def _weight(self) -> float:
        """Squared distance of neighbouring frames."""
        return self.frame_step**2

    def _squared_radius(self, near: Tensor) -> Tensor:
        """The square of the radius, 0-d fp32; `near` `[n, n]` are the squared distances of tiles."""
        if self.density is None:
            return near.new_tensor(self.radius**2)
        if self.density == 1:
            return near.new_tensor(torch.inf)
        first_left_out = near.flatten().kthvalue(int(self.density * near.numel()) + 1).values
        return first_left_out.clamp(min=0.5)

    def _predicate(self, layout: TokenLayout, limit: Tensor) -> BoxPredicate:
        """The disc of every token, in tile order; text tokens only meet whole blocks."""
        at = torch.zeros(layout.tokens, 3, dtype=torch.int32)
        at[layout.video_slice()] = layout.coordinates
        at = at[tile_order(layout, self.tile).query]
        reach = torch.tensor(layout.grid, dtype=torch.int32)  # the box holds all: the disc decides
        # Coordinates count twice in the rule of the predicate, which knows the middle of a box by its borders.
        ball = torch.tensor([self._weight, 1.0, 1.0, 4 * float(limit)])
        return BoxPredicate(at - reach, at + reach + 1, at, ball=ball)

    def logit_scale(self, head_dim: int, layout: TokenLayout) -> float | None:
        """1 / sqrt(head_dim), larger for more tokens than the model was trained with when `proportional`."""
        if not self.proportional:
            return None
        return math.sqrt(math.log(layout.tokens) / math.log(_TRAINED_TOKENS) / head_dim)

    @property
    def remainder(self) -> Remainder | None:
        """As chosen."""
        return Remainder("mean") if self.remainder_ == "mean" else None

    @property
    def completes(self) -> bool:
        """Whether pooled keys are to be added."""
        return self.remainder_ == "pooled"

    def extra_density(self, layout: TokenLayout) -> float:
        """With the remainder "pooled" all pooled keys, for every query of the video."""
        frames, height, width = layout.grid
        cells = frames * -(-height // self.pool) * -(-width // self.pool)
        return cells * layout.video / layout.tokens**2 if self.completes else 0.0

    def complete(self, part: PartialAttention) -> Tensor:
        """Merge what image queries see of all pooled keys. Tile by tile."""
        layout, video, q = part.layout, part.layout.video_slice(), part.q
        cell = self._cells(layout).to(q.device)
        count = int(cell.max()) + 1
        size = cell.bincount().unsqueeze(-1)
        means = []
        for x in (part.k, part.v):
            sums = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=torch.float32, device=x.device)
            means.append((sums.index_add_(2, cell, x[:, :, video].float()) / size).to(x.dtype))
        pooled = BlockPlan.full(Blocking.uniform(layout.video, 64), Blocking.uniform(count, 64), q.device)
        queries = q[:, :, video].contiguous()
        far = block_attention(queries, means[0], means[1], pooled, scale=part.scale, return_lse=True)
        part.call.extra_density += self.extra_density(layout)
        out = part.out.clone()
        out[:, :, video] = merge([out[:, :, video], far[0]], [part.lse[:, :, video], far[1]])[0]
        return out

    def _cells(self, layout: TokenLayout) -> Tensor:
        """Index of the cell of every video token in tile order, int64 `[video]`; cells at the end may be smaller."""
        at = layout.coordinates.long() // torch.tensor([1, self.pool, self.pool])
        rows, columns = (-(-n // self.pool) for n in layout.grid[1:])
        cell = (at[:, 0] * rows + at[:, 1]) * columns + at[:, 2]
        return cell[tile_order(layout, self.tile).query[layout.video_slice()] - layout.video_start]


def _ends(tile_of: Tensor) -> tuple[Tensor, Tensor]:
    """First and last coordinate of every tile of an axis, int64 `[n]` each."""
    end = tile_of.bincount().cumsum(0)
    return torch.cat([end.new_zeros(1), end[:-1]]), end - 1


def _nearest(tile_of: Tensor) -> Tensor:
    """Distance of the nearest coordinates of each two tiles of an axis, int64 `[n, n]`."""
    first, last = _ends(tile_of)
    return torch.maximum(first - last.unsqueeze(-1), first.unsqueeze(-1) - last).clamp(min=0)


def _farthest(tile_of: Tensor) -> Tensor:
    """Distance of the farthest coordinates of each two tiles of an axis, int64 `[n, n]`."""
    first, last = _ends(tile_of)
    return torch.maximum(last - first.unsqueeze(-1), last.unsqueeze(-1) - first)
