"""Attention to past frames, kept between the denoising steps of a chunk (arXiv 2602.05305). Experimental.

What a chunk gets from the frames before it changes little from step to step: its output and log-sum-exp are stored,
only the rest is computed anew, and both are merged. The error is that of queries a step old. Few-step models jump far
from step to step, so measure before use. Axis legend: B batch, N queries, M keys, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.pipelines.streaming.attention import CLEAN, AttentionCall, DenseContext, attend_with_lse
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import block_means

_BLOCK = 64


@dataclass(frozen=True)
class _Stored:
    """Output `[B, H, N, D]` and log-sum-exp `[B, H, N]` of the stale past keys, and which past blocks are fresh."""

    out: Tensor
    lse: Tensor
    fresh: Tensor | None


class FlashBlock(DenseContext):
    """Recompute attention to the past on some steps, reuse it on the others; the cache-writing pass is always dense.

    Args:
        refresh_steps: places in the noise ladder where the past is attended anew. Default 0 and 1.
        dense_layers: layers that never reuse. Default 10 to 17, the middle of a 30-layer model.
        fresh: share of past key blocks, the best by pooled score for each query block, that are computed anew at every
            step; the stored part then holds the others only. Default 0.

    Raises:
        ConfigError: `fresh` outside [0, 1].
    """

    name = "flashblock"

    def __init__(
        self,
        refresh_steps: Sequence[int] | Set[int] = (0, 1),
        dense_layers: Sequence[int] | Set[int] = range(10, 18),
        fresh: float = 0.0,
    ) -> None:
        if not 0 <= fresh <= 1:
            raise ConfigError("flashblock.fresh", f"expected a share in [0, 1], got {fresh}")
        self.refresh_steps, self.dense_layers, self.fresh = frozenset(refresh_steps), frozenset(dense_layers), fresh
        self._stored: dict[int, _Stored] = {}

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]`."""
        past = (len(call.frames) - len(call.own)) * call.frame_tokens
        blocks = -(-past // _BLOCK)
        keep = round(self.fresh * blocks)
        if (reason := self._dense_reason(call, keep == blocks)) is not None:
            return self.dense(call, q, k, v, reason)
        with call.record.timed("attend", q.device):
            return self._attend(call, q, k, v, past, keep)

    def _dense_reason(self, call: AttentionCall, is_all_fresh: bool) -> str | None:
        if call.step == CLEAN:
            return "the pass that writes the cache is dense"
        if call.layer in self.dense_layers:
            return f"layer {call.layer} is in dense_layers"
        return "all of the past is computed anew" if is_all_fresh else None

    def _attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, past: int, keep: int) -> Tensor:
        """The stored part, made anew where it is due, merged with own keys and `keep` fresh blocks of the past."""
        (old_k, own_k), (old_v, own_v) = call.split(k), call.split(v)
        stored = self._stored.get(call.layer)
        if stored is None or call.step in self.refresh_steps:
            stored = _attend_past(q, old_k, old_v, keep)
            self._stored[call.layer] = stored
            call.record.reason = f"step {call.step} computes the past anew"
        else:
            fresh = min(past, keep * _BLOCK)
            call.record.backend, call.record.density = self.name, (k.shape[1] - past + fresh) / k.shape[1]
        if stored.fresh is None:
            out, lse = attend_with_lse(q, own_k, own_v)
            out = out.transpose(1, 2)
        else:
            out, lse = _attend_fresh(q, torch.cat([old_k, own_k], 1), torch.cat([old_v, own_v], 1), past, stored.fresh)
        return merge((out, stored.out), (lse, stored.lse))[0].transpose(1, 2)

    def begin_chunk(self, frames: range) -> None:
        """The stored parts are those of other queries: drop them."""
        self._stored.clear()

    def reset(self) -> None:
        """Keys have changed: drop what was computed with the old ones."""
        self._stored.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the stored parts."""
        tensors = [x for part in self._stored.values() for x in (part.out, part.lse, part.fresh) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)


def _attend_past(q: Tensor, k: Tensor, v: Tensor, keep: int) -> _Stored:
    """Attention to the past without the `keep` best blocks of each row, which are named instead."""
    if not keep:
        out, lse = attend_with_lse(q, k, v)
        return _Stored(out.transpose(1, 2), lse, None)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    rows, columns = Blocking.uniform(q.shape[2], _BLOCK), Blocking.uniform(k.shape[2], _BLOCK)
    scores = block_means(q, rows)[0] @ block_means(k, columns)[0].transpose(-1, -2)
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :keep]
    fresh = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
    out, lse = block_attention(q, k, v, BlockPlan.from_mask(~fresh, rows, columns), return_lse=True)
    return _Stored(out, lse, fresh)


def _attend_fresh(q: Tensor, k: Tensor, v: Tensor, past: int, fresh: Tensor) -> tuple[Tensor, Tensor]:
    """Attention to the named blocks of the past and to all own keys, which stand after it."""
    rows, columns = Blocking.uniform(q.shape[1], _BLOCK), Blocking.segments([past, k.shape[1] - past], _BLOCK)
    own = fresh.new_ones(*fresh.shape[:-1], columns.count - fresh.shape[-1])
    plan = BlockPlan.from_mask(torch.cat([fresh, own], dim=-1), rows, columns)
    return block_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan, return_lse=True)
