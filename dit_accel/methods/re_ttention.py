"""Re-ttention: a static window, and what lies outside it as it was at the last dense step."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Density, Method, Size
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate
from dit_accel.remainders.history import with_history
from dit_accel.remainders.partial import PartialAttention
from dit_accel.selection import sink_blocks
from dit_accel.state import CallContext


@register("re_ttention")
class ReTtention(Method):
    """Re-ttention (arXiv 2505.22918): windowed attention, rescaled to its share of the last dense softmax.

    Every `period` steps, and at the first one, attention is dense: the share of the softmax that the window holds and
    what lies outside it are kept. Between, the output is share * window + kept rest. It keeps one tensor like the
    output per layer and guidance branch, and pays for a dense call every `period` steps, which the report counts.

    The published code lets the ramp raise the share above 1; here it stops there.

    Args:
        density: width of the window as a share of the frame ("frame") or of the sequence ("band"). Default 0.03125.
        window: "frame": tokens whose place in their frame is at most half a width away, in every frame (the published
            rule for CogVideoX); "band": tokens whose place in the raster is (for images).
        block: block size in tokens.
        period: steps from one dense step to the next.
        ramp: growth of the share per step after the first, 0.04 as published.
    """

    source: ClassVar[str] = "arXiv 2505.22918"
    is_static: ClassVar[bool] = True

    density: Density = 0.03125
    window: Literal["frame", "band"] = "frame"
    block: BlockSize = 64
    period: Size = 5
    ramp: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.04

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The window. q, k are not looked at; text attends all, and all attend text and conditioning frames."""
        layout, blocks = call.layout, self._blocks(call.layout)
        size = layout.frame_tokens if self.window == "frame" else layout.video
        place = torch.zeros(layout.tokens, dtype=torch.int32)
        place[layout.video_slice()] = torch.arange(layout.video, dtype=torch.int32) % size
        reach = int(size * self.density) // 2
        is_text = torch.ones(layout.tokens, dtype=torch.bool)
        is_text[layout.video_slice()] = False
        prefix = sink_blocks(layout, blocks, 0)
        inside, whole = (mask | prefix for mask in _window_blocks(blocks, layout, size, reach))
        lower = (place - reach).masked_fill(is_text, -1).unsqueeze(-1)
        upper = (place + reach + 1).masked_fill(is_text, size).unsqueeze(-1)
        return BlockPlan.from_mask(inside, blocks, blocks, whole, BoxPredicate(lower, upper, place.unsqueeze(-1)))

    def _blocks(self, layout: TokenLayout) -> Blocking:
        """Runs of the raster; none holds tokens of conditioning frames and of others."""
        leading = layout.prefix
        runs = [part for part in (leading, layout.video - leading) if part]
        return layout.blocks(self.block, video=Blocking.segments(runs, self.block))

    @property
    def cycle(self) -> int:
        """From one dense step to the next."""
        return self.period

    @property
    def completes(self) -> bool:
        """The kept rest is added after the kernel."""
        return True

    def extra_density(self, layout: TokenLayout) -> float:
        """Everything, every `period` steps."""
        return 1 / self.period

    def complete(self, part: PartialAttention) -> Tensor:
        """Dense at a refresh, else the window at its kept share and the kept rest."""
        return with_history(part, self.period, self.ramp, self)


def _window_blocks(blocks: Blocking, layout: TokenLayout, size: int, reach: int) -> tuple[Tensor, Tensor]:
    """Which pairs of blocks hold a pair of tokens in the window, and which hold no other, bool `[n, n]` each.

    A block covers a run of places, two where it goes over the end of a frame, and all places where it is longer.
    """
    text = layout.text_blocks(blocks)
    cover = torch.zeros(blocks.count, size, dtype=torch.bool)
    place = (torch.arange(layout.tokens) - layout.video_start) % size
    cover[blocks.block_of_token(), place] = True
    near = torch.zeros_like(cover)
    far = cover.new_zeros(cover.shape)
    for block in range(blocks.count):
        at = cover[block].nonzero().flatten()
        distance_first = torch.searchsorted(at, torch.arange(size).clamp(max=int(at[-1])))
        above = at[distance_first.clamp(max=len(at) - 1)]
        below = at[(distance_first - 1).clamp(min=0)]
        places = torch.arange(size)
        near[block] = torch.minimum((above - places).abs(), (below - places).abs()) <= reach
        far[block] = torch.maximum((at[0] - places).abs(), (at[-1] - places).abs()) > reach
    inside = (near.float() @ cover.float().T) > 0
    whole = (far.float() @ cover.float().T) == 0
    always = text | text.unsqueeze(-1)
    return inside | always, (whole & inside) | always
