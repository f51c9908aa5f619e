"""Which part of an attention call one process holds, where several share it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class HeadShard:
    """Some heads of a layer: `count` of its `total`, from `first` on; those beyond the total are padding."""

    first: int
    count: int
    total: int

    def cut(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Of values that stand one per head of the model, those of the shard; a single one stands for all heads.

        Heads that are padding take that of the last head.
        """
        if len(values) == 1:
            return values
        return tuple(values[min(head, len(values) - 1)] for head in range(self.first, self.first + self.count))

    def grouped(self, groups: int, path: str = "schedule.head_groups") -> HeadShard:
        """The same with runs of neighbouring heads counted for heads, `groups` of which the model's heads make.

        Args:
            groups: a divisor of the total.
            path: what says how many, for errors.

        Raises:
            ConfigError: it holds parts of some.
        """
        run = self.total // groups
        if self.first % run or self.count % run:
            raise ConfigError(
                path,
                f"expected groups of which each lies in one process, which holds {self.count} heads; got groups of "
                f"{run} heads: use more of them, or fewer processes",
            )
        return HeadShard(self.first // run, self.count // run, groups)


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
