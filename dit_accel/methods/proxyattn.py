"""ProxyAttn: one ranking per group of heads from their mean, and a budget for every head of its own."""

from __future__ import annotations

import math
from typing import ClassVar, Self

from torch import Tensor

from dit_accel.methods.base import Size
from dit_accel.methods.dynamic import DynamicMethod, Share
from dit_accel.methods.registry import register
from dit_accel.plan import Blocking
from dit_accel.reuse import representative_heads
from dit_accel.selection import Budget, TopK, real_blocks
from dit_accel.selection.samples import largest_weights, probe_profiles
from dit_accel.selection.scores import log_mass
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext
from dit_accel.widest import widened


@register("proxyattn")
class ProxyAttn(DynamicMethod):
    """Blocks ranked by the largest attention weight of representative heads, as many as each head itself needs.

    To share whole plans among heads under any other method, use the schedule's `head_groups`.

    Args:
        groups: representatives, each the mean of as many neighbouring heads; their greatest common divisor is taken.
        stride: of every so many queries and keys the first is looked at. Default 8: 4 costs three times as much and
            gains under 1 % of the recall.
        mass: share of the mass of probed queries that sets the number of blocks of a head. No published value is known.
        probes: query blocks that are probed for it, spread over the video. The paper probes the last, which in a video
            model may be text or padding.
        probe_rows: queries of each that are looked at, spread over it; by default as many in all as in the paper.
    """

    source: ClassVar[str] = "arXiv 2509.24745"

    groups: Size = 4
    stride: Size = 8
    mass: Share = 0.9
    probes: Size = 4
    probe_rows: Size = 16

    def of_heads(self, shard: HeadShard) -> Self:
        """With the representatives of these heads.

        Raises:
            ConfigError: one stands for heads of two processes.
        """
        groups = shard.grouped(math.gcd(self.groups, shard.total), f"method.{self.name}.groups").count
        return self if shard.count == shard.total else self.model_copy(update={"groups": groups})

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Largest weights of the representatives, for all their heads. q, k `[B, H, N, D]`."""
        heads, groups = q.shape[1], math.gcd(self.groups, q.shape[1])
        q, k = (representative_heads(x, groups) for x in (q, k))
        weights = largest_weights(q, k, q_blocks, k_blocks, call.layout, self.stride)
        return log_mass(weights, real_blocks(k_blocks, call.layout, q.device)).repeat_interleave(heads // groups, 1)

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """As many blocks as hold `mass` of what the probed queries of a head attend, rounded up."""
        q_blocks, k_blocks = self.blocks(call.layout)
        profile = probe_profiles(q, k, q_blocks, k_blocks, call.layout, self.probes, self.probe_rows).mean(2)
        best = widened(profile.sort(dim=-1, descending=True).values)
        needed = (best.cumsum(-1) - best < self.mass - 1e-12).sum(-1) if self.mass < 1 else (best > 0).sum(-1)
        total = real_blocks(k_blocks, call.layout, q.device).sum(-1).squeeze(-1)
        return TopK(share=widened(needed) / total, rounding="ceil")
