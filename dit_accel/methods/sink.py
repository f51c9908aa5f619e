"""A sink that everybody sees and a band around the query: in frames, or in tokens."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Density, Method, Size
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate
from dit_accel.state import CallContext
from dit_accel.static_masks import frame_blocks, half_width, spans, with_text
from dit_accel.widest import widened


@register("sink_recent")
class SinkRecent(Method):
    """Frame sink and recent frames (after arXiv 2309.17453), for models that attend in both directions.

    A query of frame f sees the sink frames and the frames j with |f - j| < `recent_frames`. The unit is the whole
    latent frame: no published video model keeps loose tokens. With spatial Sparse VideoGen heads in whole frames this
    is their mask; with `causal` it is what a rolling key cache with a sink holds.

    Args:
        sink_frames: leading frames that every query sees; conditioning frames always count as such. Default 1.
        recent_frames: frames to each side, the query's own included. Default 4.
        causal: queries see no later frame, the sink included.
        density: the largest `recent_frames` whose plan keeps no more than this share; the sink and the own frame stay.
            Default None: `recent_frames` decides.
        block: block size in tokens. Blocks do not cross frames, so that the frames kept are exact.
    """

    source: ClassVar[str] = "arXiv 2309.17453"
    is_static: ClassVar[bool] = True

    sink_frames: Count = 1
    recent_frames: Size = 4
    causal: bool = False
    density: Density | None = None
    block: BlockSize = 64

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """All blocks of the frames seen. q, k `[B, H, N, D]` are not looked at; text attends all, all attend it."""
        layout = call.layout
        blocks = frame_blocks(layout, self.block)
        frame_of = spans(blocks, layout)[0] // layout.frame_tokens
        video = self.frames_seen(layout)[frame_of.unsqueeze(-1), frame_of]
        return BlockPlan.from_mask(with_text(layout, blocks, video), blocks, blocks)

    def frames_seen(self, layout: TokenLayout) -> Tensor:
        """Bool `[F, F]`: the frames that each frame sees."""
        if self.density is None:
            return self._mask(layout, self.recent_frames)
        found = [self._mask(layout, recent) for recent in range(1, layout.frames + 1)]
        return next((m for m in reversed(found) if widened(m).mean() <= self.density), found[0])

    def _mask(self, layout: TokenLayout, recent: int) -> Tensor:
        f = torch.arange(layout.frames)
        seen = (f.unsqueeze(-1) - f).abs() < recent
        seen |= f < max(self.sink_frames, layout.prefix_frames)
        return seen & (f <= f.unsqueeze(-1)) if self.causal else seen


@register("a_shape")
class AShape(Method):
    """A-shape (arXiv 2407.02490, 2309.17453): the first tokens for everybody, and a band around the diagonal.

    The original is causal: a baseline from language models. `sink_recent` is its reading in frames. Published: n_init
    128 and n_local 3968; tri-shape has n_last 100; streaming caches 4 + 2000 and 64 + 256.

    Args:
        n_init: leading video tokens that every query sees; conditioning frames always count as such.
        n_local: query i sees the keys with |i - j| < n_local.
        n_last: trailing video tokens that see everything (tri-shape). Default 0.
        causal: queries see no later video token, as published. Default False: both directions, as in the models here.
        density: choose n_local so that the band in both directions has this share of the token pairs; the sink comes on
            top. Default None: `n_local` decides.
        block: block size in tokens; the band is exact, token by token.
    """

    source: ClassVar[str] = "arXiv 2407.02490"
    is_static: ClassVar[bool] = True

    n_init: Count = 128
    n_local: Size = 3968
    n_last: Count = 0
    causal: bool = False
    density: Density | None = None
    block: BlockSize = 64

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Sink blocks and blocks inside the band whole, those at its rim in part. q, k are not looked at."""
        layout = call.layout
        init = min(max(self.n_init, layout.prefix), layout.video)
        last = max(init, layout.video - self.n_last)
        cuts = [n for n in (init, last - init, layout.video - last) if n]
        blocks = layout.blocks(self.block, video=Blocking.segments(cuts, self.block))
        first, end = spans(blocks, layout)
        lower, upper = self._bounds(layout, init, last)
        # Bounds ascend inside a block, so its first and its last query tell what it touches.
        visited = (end >= lower[first].unsqueeze(-1)) & (first < upper[end].unsqueeze(-1))
        whole = (first >= lower[end].unsqueeze(-1)) & (end < upper[first].unsqueeze(-1))
        sink = (first >= init).unsqueeze(-1) & (first < init)
        visited, whole = (with_text(layout, blocks, mask | sink) for mask in (visited, whole))
        return BlockPlan.from_mask(visited, blocks, blocks, whole, _predicate(layout, lower, upper))

    def _bounds(self, layout: TokenLayout, init: int, last: int) -> tuple[Tensor, Tensor]:
        """First and one-past-last key of each video query, int64 `[video]`; sink queries see the sink as one run."""
        i = torch.arange(layout.video)
        local = self.n_local if self.density is None else half_width(layout, self.density) + 1
        upper = i + 1 if self.causal else (i + local).clamp(max=layout.video)
        lower = (i - local + 1).clamp(min=0)
        lower[:init], lower[last:] = 0, 0
        if not self.causal:
            upper[:init] = upper[:init].clamp(min=init)
            upper[last:] = layout.video
        return lower, upper


def _predicate(layout: TokenLayout, lower: Tensor, upper: Tensor) -> BoxPredicate:
    """The bounds over the whole sequence; text tokens only meet whole blocks."""
    values = torch.zeros(3, layout.tokens, 1, dtype=torch.int32)
    values[:, layout.video_slice(), 0] = torch.stack([lower, upper, torch.arange(layout.video)]).to(torch.int32)
    return BoxPredicate(values[0], values[1], values[2])
