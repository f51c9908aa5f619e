"""Attention of a causal Wan pass over cached and new keys, and the policies that run it.

Axis legend: B batch, F frames of the pass, S tokens per frame, N = F * S queries, M keys, H heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel.kernels import block_attention
from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.pipelines.streaming.positions import PositionRule, Rotary
from dit_accel.pipelines.streaming.records import BRANCHES, StreamCalls, record_call
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.report.records import CallRecord

_BLOCK = 64

CLEAN = -1
"""The step of a pass over finished frames, which writes the keys and values that later chunks read."""


@dataclass(frozen=True)
class AttentionCall:
    """What an attention policy may know about one call.

    Args:
        layer: index of the self-attention layer.
        step: place in the noise ladder; `CLEAN` for the pass that writes the cache.
        own: frames of the queries.
        frames: frames of the keys, in the order in which their keys stand.
        positions: temporal position of each of `frames`.
        grid: (height, width) of a frame in tokens.
        rotary: rotates keys in time.
        backend: attention backend chosen by `set_attention_backend`. None: PyTorch's.
        record: where a policy notes what it computed, for the report. Default: one that nobody reads.
    """

    layer: int
    step: int
    own: range
    frames: tuple[int, ...]
    positions: tuple[float, ...]
    grid: tuple[int, int]
    rotary: Rotary
    backend: Any = None
    record: CallRecord = field(
        default_factory=partial(record_call, 0, 0, BRANCHES[0], 0, "dense", None), compare=False, repr=False
    )

    @property
    def frame_tokens(self) -> int:
        """Tokens per frame."""
        return self.grid[0] * self.grid[1]

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys or values `[B, M, H, D]` of the past frames, and of the queries' own frames."""
        frames = x.unflatten(1, (len(self.frames), -1))
        own = [place for place, frame in enumerate(self.frames) if frame in self.own]
        past = [place for place, frame in enumerate(self.frames) if frame not in self.own]
        return _take(frames, past), _take(frames, own)


def _take(frames: Tensor, places: list[int]) -> Tensor:
    """Some frames of `[B, F, S, H, D]` as tokens `[B, N, H, D]`; a view where they stand together."""
    if places and places == list(range(places[0], places[-1] + 1)):
        return frames[:, places[0] : places[-1] + 1].flatten(1, 2)
    return frames[:, places].flatten(1, 2)


def attend_with_lse(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Dense attention that also says its log-sum-exp, for merging parts.

    Args:
        q: `[B, N, H, D]`.
        k, v: `[B, M, H, D]`, M at least 1.

    Returns:
        Output `[B, N, H, D]` and log-sum-exp `[B, H, N]`.
    """
    plan = BlockPlan.full(Blocking.uniform(q.shape[1], _BLOCK), Blocking.uniform(k.shape[1], _BLOCK), q.device)
    out, lse = block_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan, return_lse=True)
    return out.transpose(1, 2), lse


class DenseContext:
    """Dense attention over everything that is visible, and the base of the other policies.

    One instance serves one stream and one guidance branch, and holds what the policy keeps between calls. `name` and
    `requested_density` are for the report.
    """

    name: str = "dense"
    requested_density: float | None = None

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]`, all rotated. Returns `[B, N, H, D]`."""
        return self.dense(call, q, k, v, "attention of the stream is dense")

    @staticmethod
    def dense(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, reason: str) -> Tensor:
        """`attend` with everything, and a note why; shapes as there."""
        call.record.reason = reason
        with call.record.timed("attend", q.device):
            out: Tensor = dispatch_attention_fn(q, k, v, backend=call.backend)
        return out

    def evict(self, layer: int, frame: int, k: Tensor, v: Tensor, grid: tuple[int, int]) -> None:
        """A frame leaves the cache.

        Args:
            layer, frame: which.
            k, v: `[B, S, H, D]`, gone after this call; keys are rotated in space and not in time.
            grid: (height, width) of the frame in tokens.
        """

    def begin_chunk(self, frames: range) -> None:
        """A new chunk begins, or the same one once more."""

    def reset(self) -> None:
        """Drop everything: the prompt or the scene has changed."""

    @property
    def bytes(self) -> int:
        """Bytes held between calls."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """What must be kept to go on at the next chunk."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`, after `reset`."""


@dataclass
class Branch:
    """One guidance branch of one stream: its cache, its text and its policy.

    Args:
        cache: keys and values of finished frames.
        rule: temporal positions.
        rotary: rotates queries and keys.
        text: prompt embeddings `[B, L, C]`.
        policy: how attention runs over the visible keys.
        text_kv: keys and values of the text per cross-attention layer `[B, L, H, D]`, made at the first pass.
        name: of the branch, for the report.
        calls: where its calls are noted. None: nowhere.
    """

    cache: FrameCache
    rule: PositionRule
    rotary: Rotary
    text: Tensor
    policy: DenseContext
    text_kv: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    name: str = BRANCHES[0]
    calls: StreamCalls | None = None

    def evict(self, layer: int, frame: int, k: Tensor, v: Tensor, grid: tuple[int, int]) -> None:
        """Hand a frame that leaves the cache to the policy; k, v `[B, S, H, D]` as stored."""
        if self.rule.is_fixed:
            k = self.rotary.time(k, [-at for at in self.rule.of([frame], self.cache.origin)])
        self.policy.evict(layer, frame, k, v, grid)

    def set_text(self, text: Tensor) -> None:
        """Change the prompt; the cached keys and values of the old one are dropped."""
        self.text = text
        self.text_kv.clear()

    def record(self, layer: int, step: int) -> CallRecord:
        """The record of a call that begins."""
        calls, policy = self.calls, self.policy
        chunk = 0 if calls is None else calls.chunk
        record = record_call(layer, step, self.name, chunk, policy.name, policy.requested_density)
        if calls is not None:
            calls.append(record)
        return record

    @property
    def bytes(self) -> int:
        """Bytes of the self-attention cache, the text's keys and values, and what the policy holds."""
        text = sum(x.numel() * x.element_size() for pair in self.text_kv.values() for x in pair)
        return self.cache.bytes + text + self.policy.bytes


@dataclass(frozen=True)
class Pass:
    """One forward pass as its attention layers see it.

    Args:
        branch: the stream's branch.
        frames: frames of the pass.
        past: cached frames it attends, ascending.
        step: place in the noise ladder, or `CLEAN`.
        write: whether keys and values go to the cache; else they live for this call alone.
        grid: (height, width) of a frame in tokens.
    """

    branch: Branch
    frames: range
    past: tuple[int, ...]
    step: int
    write: bool
    grid: tuple[int, int]

    def positions(self) -> dict[int, float]:
        """Temporal position of every attended frame."""
        frames = [*self.past, *self.frames]
        cache = self.branch.cache
        return dict(zip(frames, self.branch.rule.of(frames, cache.origin), strict=True))


@torch.compiler.disable
def attend_pass(now: Pass, layer: int, q: Tensor, k: Tensor, v: Tensor, backend: Any) -> Tensor:
    """Self-attention of one layer: rotate, write to or join the cache, and let the policy attend.

    Args:
        now: the pass.
        layer: index of the layer.
        q, k, v: projections of the pass's own tokens `[B, N, H, D]`, normalised and not rotated.
        backend: attention backend, None for PyTorch's.
    """
    branch, at = now.branch, now.positions()
    own = [at[frame] for frame in now.frames]
    q = branch.rotary.time(branch.rotary.space(q, now.grid), own)
    k = branch.rotary.space(k, now.grid)
    if branch.rule.is_fixed:
        k = branch.rotary.time(k, own)
    frames = [*now.past, *now.frames]
    if now.write:
        branch.cache.write(layer, now.frames, k, v)
        frames = branch.cache.in_slot_order(frames)
        keys, values = branch.cache.read(layer, frames)
    elif now.past:
        past = branch.cache.read(layer, list(now.past))
        keys, values = (torch.cat([old, new], dim=1) for old, new in zip(past, (k, v), strict=True))
    else:
        keys, values = k, v
    positions = tuple(at[frame] for frame in frames)
    if not branch.rule.is_fixed:
        keys = branch.rotary.time(keys, positions)
    record = branch.record(layer, now.step)
    call = AttentionCall(
        layer, now.step, now.frames, tuple(frames), positions, now.grid, branch.rotary, backend, record
    )
    return branch.policy.attend(call, q, keys, values)
