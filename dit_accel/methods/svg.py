"""Sparse VideoGen: every head is looked at and called spatial or temporal, call by call."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Density, Method, Size
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate
from dit_accel.sampling import sample_rows, sampled_logits
from dit_accel.state import CallContext
from dit_accel.static_masks import band, half_width, inside_band, spans, token_major, token_major_places, with_text
from dit_accel.transfer import to_device

_KIND = "svg.kind"
_PROFILE_BLOCK = 128


@register("svg")
class SVG(Method):
    """Sparse VideoGen (arXiv 2502.01776): a band, in raster order for spatial heads and token-major for temporal ones.

    A few sampled queries are attended in full and under both masks; the smaller squared error names the head, the
    spatial kind first. The band is exact, token by token, in the blocks at its rim.

    Published (density, dense steps, dense layers): Wan2.1-14B text to video 720p 0.30, 10 of 50, 1; image to video
    720p 0.30, 14 of 40, 1; 480p 0.30, 8 of 40, 1; HunyuanVideo 720p 0.25, 5 of 50, 1; 480p 0.20, 2 of 50, 0;
    CogVideoX1.5 0.25, noise above 0.8, 2, with 32 rows; Cosmos-1.0-14B 0.25, 10 of 35. All with 64 rows otherwise.

    Args:
        density: kept share of the token pairs, from which the band's width follows; the sink comes on top.
        rows: sampled queries, spread over the whole video (released code: the first 10 000 tokens only).
        sink: "frame": every query sees the first frame, as the paper means it, for both kinds; conditioning frames
            count as such; an image has none. "reordered": every query sees the first keys of the new order, as many as
            a frame has, which for temporal heads are the top rows of all frames (released code for Wan). "none"
            (released code for HunyuanVideo and CogVideoX).
        rounding: of the band's width: "none", "up" (released for Wan), "down" (for HunyuanVideo and CogVideoX).
        profile_frames: None: heads are judged under the masks that are computed; c: under |I - J| < floor(c * s / 128)
            in blocks of 128, whatever the density (released code: 2 for Wan, 1.5 for HunyuanVideo and CogVideoX).
        rim: blocks that the band only touches: "exact": its tokens alone, as published; "whole": all of them, which
            attends more and is cheaper, since no token is masked. Default "exact".
        block: block size in tokens.
    """

    source: ClassVar[str] = "arXiv 2502.01776"

    density: Density = 0.3
    rows: Size = 64
    sink: Literal["frame", "reordered", "none"] = "frame"
    rounding: Literal["none", "up", "down"] = "none"
    profile_frames: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    rim: Literal["exact", "whole"] = "exact"
    block: BlockSize = 64

    @property
    def orders_each_head(self) -> bool:
        """Yes."""
        return True

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Raster for spatial heads, token-major for temporal ones, decided here. q, k, v `[B, H, N, D]`."""
        temporal = self.classify(q, k, v, call)
        call.memory[_KIND] = temporal
        orders = torch.stack([torch.arange(call.layout.tokens), self.temporal_order(call.layout)])
        orders = to_device(orders, q.device)
        return TokenOrder(orders[temporal.long()])

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The band of each head in its order, the sink and the text. q, k `[B, H, N, D]` are not looked at."""
        both = plans_of_kinds(self, call.layout, q.device)
        if both.indices.shape[1] == 1:
            return both
        kind = call.memory[_KIND].long()
        full = None if both.full_counts is None else both.full_counts[0, kind]
        box = both.predicate
        if box is not None and not box.is_shared:
            lower, upper, coordinates = (x[0, kind] for x in (box.lower, box.upper, box.coordinates))
            box = BoxPredicate(lower, upper, coordinates)
        return BlockPlan(both.q_blocks, both.k_blocks, both.indices[0, kind], both.counts[0, kind], full, box)

    def classify(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> Tensor:
        """Which heads are temporal, bool `[B, H]`."""
        spatial, temporal = self.errors(q, k, v, call).unbind(-1)
        return temporal < spatial

    def errors(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> Tensor:
        """Mean squared error of the sampled rows under the spatial and the temporal mask, `[B, H, 2]`."""
        layout = call.layout
        rows = sample_rows(layout, self.rows, call.seed, call.layer, call.step)
        masks = to_device(self.profile_masks(layout, rows), q.device)
        found = []
        for heads, logits in sampled_logits(q, k, rows, layout):
            values = v[:, heads].to(logits.dtype)
            if layout.is_padded:
                values = values.masked_fill(logits[:, :, :1].isneginf().transpose(-1, -2), 0)
            full = logits.softmax(-1) @ values
            outs = (logits.masked_fill(~mask, -torch.inf).softmax(-1) @ values for mask in masks)
            found.append(torch.stack([(out - full).square().mean((-1, -2)) for out in outs], -1))
        return torch.cat(found, 1)

    def profile_masks(self, layout: TokenLayout, rows: Tensor) -> Tensor:
        """Bool `[2, m, N]`: the keys, in raster order, that `rows` see as spatial and as temporal heads."""
        orders = torch.stack([torch.arange(layout.tokens), self.temporal_order(layout)])
        place = torch.empty_like(orders).scatter_(1, orders, torch.arange(layout.tokens).expand_as(orders))
        if self.profile_frames is not None:
            return self._released_profile(layout, rows)
        plan = plans_of_kinds(self, layout, torch.device("cpu"))
        kinds = (plan.of_head(0, kind).token_rows(at[rows])[0, 0][:, at] for kind, at in enumerate(place))
        return torch.stack(list(kinds))

    def _released_profile(self, layout: TokenLayout, rows: Tensor) -> Tensor:
        index = torch.arange(layout.video)
        frame, place = index // layout.frame_tokens, index % layout.frame_tokens
        at = torch.stack([index, place * layout.frames + frame])  # [2, video]
        reach = max(1, math.floor((self.profile_frames or 0) * layout.frame_tokens / _PROFILE_BLOCK))
        keys = at // _PROFILE_BLOCK
        keep = (keys[:, rows - layout.video_start].unsqueeze(-1) - keys.unsqueeze(1)).abs() < reach
        if self.sink == "frame":
            keep |= frame < self._sink_frames(layout)
        elif self.sink == "reordered":
            keep |= (at < layout.frame_tokens).unsqueeze(1)
        mask = torch.ones(2, len(rows), layout.tokens, dtype=torch.bool)
        mask[:, :, layout.video_slice()] = keep
        return mask

    def temporal_order(self, layout: TokenLayout) -> Tensor:
        """Where the tokens of a temporal head stand, int64 `[N]`: the sink frames first, so that they are one run."""
        return token_major(layout, self._sink_frames(layout)).query

    def _sink_frames(self, layout: TokenLayout) -> int:
        if self.sink != "frame" or layout.frames == 1:
            return 0
        return max(1, layout.prefix_frames)

    def plan_of_kinds(self, layout: TokenLayout) -> BlockPlan:
        """The plan of spatial and of temporal heads, `[1, 2, nq, C]`; `[1, 1, nq, C]` if they agree."""
        sink = self._sink_frames(layout)
        leading = layout.frame_tokens * (sink or (self.sink == "reordered"))
        # Coordinates of a temporal head ascend within a sink frame, and from there on.
        frames = [layout.frame_tokens] * (leading // layout.frame_tokens)
        cuts = [n for n in (*frames, layout.video - leading) if n]
        blocks = layout.blocks(self.block, video=Blocking.segments(cuts, self.block))
        first, last = spans(blocks, layout)
        width = half_width(layout, self.density, self.rounding)
        places = [torch.arange(layout.video)] + [token_major_places(layout, sink)] * (sink > 0)
        ends = [(at[first], at[last]) for at in places]
        masks = []
        for rule in (band, inside_band):
            kept = [rule(kind, kind, width) | (first < leading) for kind in ends]
            masks.append(torch.stack([with_text(layout, blocks, mask) for mask in kept]))
        if self.rim == "whole":
            return BlockPlan.from_mask(masks[0], blocks, blocks)
        at = torch.zeros(1, len(places), layout.tokens, 1, dtype=torch.int32)
        at[:, :, layout.video_slice(), 0] = torch.stack(places).to(torch.int32)
        at = at if sink else at[0, 0]
        box = BoxPredicate(at - width, at + width + 1, at)
        return BlockPlan.from_mask(masks[0], blocks, blocks, masks[1], box)


@lru_cache(maxsize=16)
def plans_of_kinds(method: SVG, layout: TokenLayout, device: torch.device) -> BlockPlan:
    """The plan of spatial and of temporal heads on `device`, `[1, 2, nq, C]`; `[1, 1, nq, C]` when they agree."""
    return method.plan_of_kinds(layout).to(device)
