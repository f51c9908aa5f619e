"""Which part of an attention call one process holds, where several share it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class HeadShard:
    """Some heads of a layer: `count` of its `total`, from `first` on; those beyond the total are padding."""

    first: int
    count: int
    total: int


@dataclass(frozen=True)
class TokenShard:
    """Share `index` of the queries of a call, whose video and text are each cut into `count` parts.

    They are cut as by `torch.tensor_split`. Keys and values are those of all tokens.
    """

    index: int
    count: int

    def tokens(self, layout: TokenLayout) -> Tensor:
        """The tokens of the share, ascending in the raster of `layout`, int64 on the CPU."""
        runs = sorted((layout.video_slice(), layout.text_slice()), key=lambda run: run.start)
        return torch.cat([torch.arange(run.start, run.stop).tensor_split(self.count)[self.index] for run in runs])
