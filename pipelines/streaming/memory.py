"""A compressed memory: frames that leave the window stay as block statistics and keep a part in every softmax.

This project's own method. Sink, window and past are one softmax: the exact part and the summary part are merged by
their log-sum-exp. Axis legend: B batch, S tokens per frame, H heads, D head size, n blocks per frame, E entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.merge import merge
from dit_accel.kernels.summary import BlockStatistics, attend_summary
from dit_accel.layout import TokenLayout
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.pipelines.streaming.attention import AttentionCall, DenseContext, attend_with_lse
from dit_accel.pipelines.streaming.positions import Rotary
from dit_accel.selection import block_means

_FIELDS = ("mean_k", "mean_v", "tokens", "variance", "cross")


@dataclass(frozen=True)
class Entry:
    """One frame, or several merged ones, of the past; keys rotated in space and not in time.

    Args:
        frame: its (mean) index in the stream.
        count: frames in it.
        blocks: statistics of its n blocks; one cross term for all of them.
    """

    frame: float
    count: int
    blocks: BlockStatistics

    def joined(self, other: Entry) -> Entry:
        """The statistics of the union of both, block by block (exact, in the coordinates of the stored keys)."""
        a, b = self.blocks, other.blocks
        tokens = a.tokens + b.tokens
        share = (b.tokens / tokens).unsqueeze(-1)
        mean_k, mean_v = torch.lerp(a.mean_k, b.mean_k, share), torch.lerp(a.mean_v, b.mean_v, share)
        variance = cross = None
        if a.variance is not None and b.variance is not None:
            between = share * (1 - share) * (a.mean_k - b.mean_k).square()
            variance = torch.lerp(a.variance, b.variance, share) + between
        if a.cross is not None and b.cross is not None:
            moved = [
                torch.einsum("bhnd,bhne->bhde", (x.mean_k - mean_k) * x.tokens.unsqueeze(-1), x.mean_v) for x in (a, b)
            ]
            cross = a.cross + b.cross + (moved[0] + moved[1]).unsqueeze(2)
        count = self.count + other.count
        frame = (self.frame * self.count + other.frame * other.count) / count
        return Entry(frame, count, BlockStatistics(mean_k, mean_v, tokens, variance, cross))


class CompressedMemory(DenseContext):
    """Dense attention over sink and window, and block statistics of everything that has left it.

    When `entries` are full, two neighbours are merged whose joint length is least for their age: old time becomes
    coarse, recent time stays fine, and memory is bounded.

    Args:
        tile: (height, width) in tokens of a block of a frame. Default 8 x 8.
        entries: statistics kept per layer, each of one frame or more. Default 64.
        variance: keep the variance of the keys, which corrects the mass of a block. Default True.
        cross: keep one cross term of keys and values per entry, the first-order term; it takes head size squared
            numbers, often more than all the rest. Default False.
        reach: the past stands at its true distance before the window, but no farther than this many frames: what lies
            beyond the trained range of positions is pulled in. Default 1: right before the window.
    """

    name = "compressed_memory"

    def __init__(
        self,
        tile: tuple[int, int] = (8, 8),
        entries: int = 64,
        variance: bool = True,
        cross: bool = False,
        reach: float = 1.0,
    ) -> None:
        self.tile, self.entries, self.variance, self.cross, self.reach = tile, entries, variance, cross, reach
        self._past: dict[int, list[Entry]] = {}

    def evict(self, layer: int, frame: int, k: Tensor, v: Tensor, grid: tuple[int, int]) -> None:
        """Summarise a frame that leaves; k, v `[B, S, H, D]`."""
        past = self._past.setdefault(layer, [])
        past.append(Entry(float(frame), 1, self._summarise(k, v, grid)))
        if len(past) > self.entries:
            # Counts that grow with age: the merged length over its distance is the least.
            spans = [(a.count + b.count) / (frame + 1 - a.frame) for a, b in pairwise(past)]
            first = spans.index(min(spans))
            past[first : first + 2] = [past[first].joined(past[first + 1])]

    def _summarise(self, k: Tensor, v: Tensor, grid: tuple[int, int]) -> BlockStatistics:
        layout = TokenLayout((1, *grid))
        order, blocks = tile_order(layout, (1, *self.tile)), tile_blocks(layout, (1, *self.tile))
        token = order.query.to(k.device)
        k, v = (x.transpose(1, 2).index_select(2, token).float() for x in (k, v))
        mean_k, mean_v = (block_means(x, blocks)[0] for x in (k, v))
        owner = blocks.block_of_token().to(k.device)
        tokens = blocks.lengths.to(k)
        away = k - mean_k.index_select(2, owner)
        variance = block_means(away.square(), blocks)[0] if self.variance else None
        cross = (away.transpose(-1, -2) @ v).unsqueeze(2) if self.cross else None
        return BlockStatistics(mean_k, mean_v, tokens, variance, cross)

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]` and the past."""
        past = self._past.get(call.layer)
        if not past:
            return self.dense(call, q, k, v, "nothing has left the window yet")
        with call.record.timed("select", q.device):
            summary = _rotate(past, self._positions(call, past), call.rotary)
        gone = sum(entry.count for entry in past) * call.frame_tokens
        call.record.backend = self.name
        call.record.density = (k.shape[1] + summary.mean_k.shape[2]) / (k.shape[1] + gone)
        with call.record.timed("attend", q.device):
            out, lse = attend_with_lse(q, k, v)
            far, far_lse = attend_summary(q.transpose(1, 2), summary)
            return merge((out.transpose(1, 2), far), (lse, far_lse.to(lse.dtype)))[0].transpose(1, 2)

    def _positions(self, call: AttentionCall, past: list[Entry]) -> tuple[float, ...]:
        """Where the past stands: before the oldest attended frame that is newer than it."""
        newer = [(frame, at) for frame, at in zip(call.frames, call.positions, strict=True) if frame > past[-1].frame]
        frame, at = min(newer)
        return tuple(at - min(frame - entry.frame, self.reach) for entry in past)

    def reset(self) -> None:
        """The scene or the prompt has changed."""
        self._past.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the statistics."""
        return sum(entry.blocks.bytes for past in self._past.values() for entry in past)

    def state_dict(self) -> dict[str, Any]:
        """All entries."""
        return {
            str(layer): [
                {"frame": x.frame, "count": x.count, **{name: getattr(x.blocks, name) for name in _FIELDS}}
                for x in past
            ]
            for layer, past in self._past.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`."""
        self.reset()
        for layer, past in state.items():
            self._past[int(layer)] = [
                Entry(
                    x["frame"],
                    x["count"],
                    BlockStatistics(x["mean_k"], x["mean_v"], x["tokens"], x["variance"], x["cross"]),
                )
                for x in past
            ]


def _rotate(past: list[Entry], positions: tuple[float, ...], rotary: Rotary) -> BlockStatistics:
    """The entries side by side, rotated in time: rotation is linear, so it acts on means as on keys."""
    blocks = [entry.blocks for entry in past]
    mean_k = _turn(torch.stack([x.mean_k for x in blocks], dim=2), positions, rotary)
    mean_v = torch.cat([x.mean_v for x in blocks], dim=2)
    variance = cross = None
    if blocks[0].variance is not None:
        # A rotation mixes the two channels of a pair: their mean variance does not depend on its angle.
        joined = torch.cat([x.variance for x in blocks if x.variance is not None], dim=2)
        dim = rotary.time_dim
        level = joined[..., :dim].unflatten(-1, (-1, 2)).mean(-1).repeat_interleave(2, dim=-1)
        variance = torch.cat([level, joined[..., dim:]], dim=-1)
    if blocks[0].cross is not None:
        joined = torch.cat([x.cross for x in blocks if x.cross is not None], dim=2).transpose(-1, -2)
        cross = _turn(joined, positions, rotary).unflatten(2, (len(past), -1)).transpose(-1, -2)
    tokens = torch.cat([x.tokens for x in blocks])
    return BlockStatistics(mean_k, mean_v, tokens, variance, cross)


def _turn(x: Tensor, positions: tuple[float, ...], rotary: Rotary) -> Tensor:
    """x `[B, H, E, n, D]` with a position for each of the E entries, to `[B, H, E * n, D]`."""
    return rotary.time(x.flatten(2, 3).transpose(1, 2), positions).transpose(1, 2)
