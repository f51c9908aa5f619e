"""Discs: every query sees the tiles within a radius, and all text."""

from __future__ import annotations

import math
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
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.state import CallContext
from dit_accel.static_masks import with_text
from dit_accel.tiling import tile_blocks, tile_order

_TRAINED_TOKENS = 64 * 64 + 512  # FLUX at 1024 x 1024, with its text


@register("clear")
class Clear(Method):
    """CLEAR (arXiv 2412.16112): a disc around each query, cut at the borders; made for FLUX with fine-tuned weights.

    A disc in raster order touches whole rows of keys; in tiles it is compact. Tiles that the disc of one of their
    queries touches are computed whole (our choice: rim keys cost nothing more). Without the published weights it holds
    up in upscaling and at radius 32 or more. Published radii: 8, 16, 32, tiles of FLUX.1-dev, no dense steps.

    Args:
        radius: a key is seen when its distance is below `radius`, in tokens.
        density: the largest radius that keeps no more than this share of the tile pairs; every tile keeps itself.
            Default None: `radius` decides.
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
        blocks = tile_blocks(call.layout, self.tile)
        return BlockPlan.from_mask(with_text(call.layout, blocks, self.tiles_seen(call.layout)), blocks, blocks)

    def tiles_seen(self, layout: TokenLayout) -> Tensor:
        """Bool `[n, n]` over the tiles of the video."""
        steps = (self.frame_step, 1.0, 1.0)
        t, h, w = (_squared_gaps(*axis) for axis in zip(layout.grid, self.tile, steps, strict=True))
        plane = h[:, None, :, None] + w[None, :, None, :]
        squared = t[:, None, None, :, None, None] + plane[None, :, :, None]
        squared = squared.flatten(3).flatten(0, 2)
        if self.density is None:
            return squared < self.radius**2
        if self.density == 1:
            return torch.ones_like(squared, dtype=torch.bool)
        first_left_out = squared.flatten().kthvalue(int(self.density * squared.numel()) + 1).values
        return squared < first_left_out.clamp(min=0.5)

    def logit_scale(self, head_dim: int, layout: TokenLayout) -> float | None:
        """1 / sqrt(head_dim), larger for more tokens than the model was trained with when `proportional`."""
        if not self.proportional:
            return None
        return math.sqrt(math.log(layout.tokens) / math.log(_TRAINED_TOKENS) / head_dim)

    @property
    def remainder(self) -> Remainder | None:
        """As chosen."""
        return Remainder("mean") if self.remainder_ == "mean" else None

    def compute(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        call: CallContext,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """As `Method.compute`, with the scale for many tokens. q, k, v `[B, H, N, D]`."""
        scale = self.logit_scale(q.shape[-1], call.layout) if scale is None else scale
        return super().compute(q, k, v, plan, call, scale, backend)

    @property
    def completes(self) -> bool:
        """Whether pooled keys are to be added."""
        return self.remainder_ == "pooled"

    def complete(
        self, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, call: CallContext
    ) -> Tensor:
        """Merge what image queries see of all pooled keys. Tensors `[B, H, N, D]`, `lse` `[B, H, N]`, tile by tile."""
        layout, video = call.layout, call.layout.video_slice()
        cell = self._cells(layout).to(q.device)
        count = int(cell.max()) + 1
        size = cell.bincount().unsqueeze(-1)
        means = []
        for x in (k, v):
            sums = torch.zeros(*x.shape[:2], count, x.shape[3], dtype=torch.float32, device=x.device)
            means.append((sums.index_add_(2, cell, x[:, :, video].float()) / size).to(x.dtype))
        pooled = BlockPlan.full(Blocking.uniform(layout.video, 64), Blocking.uniform(count, 64), q.device)
        scale = self.logit_scale(q.shape[-1], layout)
        far = block_attention(q[:, :, video].contiguous(), means[0], means[1], pooled, scale=scale, return_lse=True)
        call.extra_density += count * layout.video / layout.tokens**2
        out = out.clone()
        out[:, :, video] = merge([out[:, :, video], far[0]], [lse[:, :, video], far[1]])[0]
        return out

    def _cells(self, layout: TokenLayout) -> Tensor:
        """Index of the cell of every video token in tile order, int64 `[video]`; cells at the end may be smaller."""
        at = layout.coordinates.long() // torch.tensor([1, self.pool, self.pool])
        rows, columns = (-(-n // self.pool) for n in layout.grid[1:])
        cell = (at[:, 0] * rows + at[:, 1]) * columns + at[:, 2]
        return cell[tile_order(layout, self.tile).query[layout.video_slice()] - layout.video_start]


def _squared_gaps(length: int, size: int, step: float) -> Tensor:
    """Squared distance of the nearest coordinates of each two tiles of an axis, fp32 `[n, n]`."""
    first = torch.arange(0, length, size)
    last = (first + size).clamp(max=length) - 1
    gap = torch.maximum(first - last.unsqueeze(-1), first.unsqueeze(-1) - last).clamp(min=0)
    return (gap * step).square().float()
