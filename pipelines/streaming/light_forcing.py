"""Sparse attention that grows with the stream: whole frames first, then key blocks inside them (arXiv 2602.04789).

Published quality needs fine-tuning with it; the defaults here are a mild budget of our own. Where the paper is silent,
the choices are named in `LightForcing`. Axis legend: B batch, N queries, M keys, S tokens per frame, H heads, D head
size, F frames, n blocks per frame, nq query blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.pipelines.streaming.attention import CLEAN, AttentionCall, DenseContext
from dit_accel.pipelines.streaming.records import run_plan
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import block_means

_MOST = 0.999


def chunk_sparsity(
    frames: int, chunk: int, base: float, target: float, planned: int = 21, window: int | None = None
) -> float:
    """Share of past keys that a chunk may leave out: dense for the first chunk, then rising towards `base`.

    s = base - beta / sqrt(c) for c frames up to the end of the chunk, with beta such that over the chunks 2 to n of the
    planned video the keys attended are those of a constant `target`: beta = (base - target) Σ l / Σ (l / sqrt(c)),
    l = min(c, window). Beyond the planned length, or the window, s stays what it was at its end.

    Args:
        frames: c.
        chunk: frames per chunk.
        base, target: sparsities, base at least target.
        planned: frames of the video for which beta is solved.
        window: frames that a chunk can see. Default: all.
    """
    if frames <= chunk:
        return 0.0
    ends = list(range(2 * chunk, max(planned, 2 * chunk) + 1, chunk))
    seen = [end if window is None else min(end, window) for end in ends]
    beta = (base - target) * sum(seen) / sum(keys / end**0.5 for keys, end in zip(seen, ends, strict=True))
    last = ends[-1] if window is None else min(ends[-1], window)
    at = min(frames, max(last, 2 * chunk))
    return min(max(base - beta / at**0.5, 0.0), _MOST)


class LightForcing(DenseContext):
    """Chunk-aware growth of sparsity, and hierarchical selection of frames and blocks.

    Of the past, each query block keeps its best `top_frames` frames by pooled score, and always the sink and the most
    recent ones; in these it keeps the best key blocks up to the budget of the chunk, at least the best one of each
    frame that is always kept. Own frames are dense and outside the budget. The cache-writing pass is dense.

    Args:
        base, target: see `chunk_sparsity`. Defaults 0.6 and 0.5 (0.95 and 0.85 are known for tuned weights).
        top_frames: default 6.
        sink_frames, recent_frames: always kept. Defaults 1 and 2.
        block: tokens per block; no block crosses a frame. Default 40.
        planned: frames for which the growth is planned. Default 21.
        window: frames that a chunk can see. Default: all of `planned`.

    Raises:
        ConfigError: sparsities outside [0, 1), or a base below the target.
    """

    name = "light_forcing"

    def __init__(
        self,
        base: float = 0.6,
        target: float = 0.5,
        top_frames: int = 6,
        sink_frames: int = 1,
        recent_frames: int = 2,
        block: int = 40,
        planned: int = 21,
        window: int | None = None,
    ) -> None:
        if not 0 <= target <= base < 1:
            raise ConfigError("light_forcing", f"expected 0 <= target <= base < 1, got {target} and {base}")
        self.base, self.target, self.planned, self.window = base, target, planned, window
        self.top_frames, self.block = top_frames, block
        self.sink_frames, self.recent_frames = sink_frames, recent_frames
        self._pooled: dict[int, dict[int, Tensor]] = {}

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]`."""
        if call.step == CLEAN:
            self._remember(call, k)
            return self.dense(call, q, k, v, "the pass that writes the cache is dense")
        seen = call.own.stop - min(call.frames)
        sparsity = chunk_sparsity(seen, len(call.own), self.base, self.target, self.planned, self.window)
        if sparsity == 0:
            return self.dense(call, q, k, v, f"the budget after {seen} frames keeps all of the past")
        past = sum(frame not in call.own for frame in call.frames)
        call.record.requested = 1 - sparsity * past / len(call.frames)
        with call.record.timed("select", q.device):
            plan = self.plan(call, q, k, sparsity)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return run_plan(call.record, q, k, v, plan).transpose(1, 2)

    def plan(self, call: AttentionCall, q: Tensor, k: Tensor, sparsity: float) -> BlockPlan:
        """The key blocks of each query block, for q `[B, N, H, D]` and k `[B, M, H, D]`."""
        tokens, frames = call.frame_tokens, len(call.frames)
        rows = Blocking.segments([tokens] * len(call.own), self.block)
        columns = Blocking.segments([tokens] * frames, self.block)
        mean_q = block_means(q.transpose(1, 2), rows)[0]
        blocks = self._block_keys(call, k)
        lengths = columns.lengths[: columns.count // frames].to(blocks)
        frame_keys = (blocks * lengths.view(-1, 1)).sum(-2) / tokens
        past = torch.tensor([frame not in call.own for frame in call.frames], device=q.device)
        chosen, always = self._frames(torch.einsum("bhqd,bhfd->bhqf", mean_q, frame_keys), past, call)
        scores = torch.einsum("bhqd,bhfnd->bhqfn", mean_q, blocks)
        keep = round((1 - sparsity) * int(past.sum()) * blocks.shape[-2])
        kept = _best_blocks(scores, chosen, always, keep)
        kept[..., ~past, :] = True
        return BlockPlan.from_mask(kept.flatten(-2), rows, columns)

    def _frames(self, scores: Tensor, past: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """Which past frames each row may take blocks from, bool `[B, H, nq, F]`, and which it always does, `[F]`."""
        order = sorted(frame for frame in call.frames if frame not in call.own)
        fixed = {*order[: self.sink_frames], *order[len(order) - min(self.recent_frames, len(order)) :]}
        always = torch.tensor([frame in fixed for frame in call.frames], device=scores.device)
        scores = scores.masked_fill(~past, -torch.inf)
        best = scores.argsort(dim=-1, descending=True, stable=True)[..., : min(self.top_frames, len(order))]
        chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
        return (chosen | always) & past, always

    def _block_keys(self, call: AttentionCall, k: Tensor) -> Tensor:
        """Mean keys `[B, H, F, n, D]`; those of finished frames are kept, and turned to where these are now."""
        kept = self._pooled.get(call.layer, {})
        fresh = [place for place, frame in enumerate(call.frames) if frame in call.own or frame not in kept]
        pooled = self._pool(k.unflatten(1, (len(call.frames), -1))[:, fresh].flatten(1, 2), call.frame_tokens)
        by_place = dict(zip(fresh, pooled.unbind(1), strict=True))
        old = [place for place in range(len(call.frames)) if place not in by_place]
        if old:
            stack = torch.stack([kept[call.frames[place]] for place in old], dim=1)
            at = [call.positions[place] for place in old]
            turned = call.rotary.time(stack.flatten(1, 2), at).unflatten(1, (len(old), -1))
            by_place |= dict(zip(old, turned.unbind(1), strict=True))
        return torch.stack([by_place[place] for place in range(len(call.frames))], dim=1).permute(0, 3, 1, 2, 4)

    def _pool(self, k: Tensor, tokens: int) -> Tensor:
        """Block means `[B, F, n, H, D]` of keys `[B, F * S, H, D]`."""
        frames = k.shape[1] // tokens
        means = block_means(k.transpose(1, 2), Blocking.segments([tokens] * frames, self.block))[0]
        return means.transpose(1, 2).unflatten(1, (frames, -1))

    def _remember(self, call: AttentionCall, k: Tensor) -> None:
        """Keep the block means of finished frames, not rotated in time, and forget frames that have gone."""
        own = call.split(k)[1]
        back = [-at for frame, at in zip(call.frames, call.positions, strict=True) if frame in call.own]
        pooled = self._pool(own, call.frame_tokens)
        raw = call.rotary.time(pooled.flatten(1, 2), back).unflatten(1, pooled.shape[1:3])
        kept = self._pooled.setdefault(call.layer, {})
        own_frames = [frame for frame in call.frames if frame in call.own]
        kept.update(zip(own_frames, raw.unbind(1), strict=True))
        for frame in set(kept) - set(call.frames):
            del kept[frame]

    def reset(self) -> None:
        """The prompt or the scene has changed: the keys are new."""
        self._pooled.clear()

    @property
    def bytes(self) -> int:
        """Bytes of the kept block means."""
        return sum(x.numel() * x.element_size() for frames in self._pooled.values() for x in frames.values())

    def state_dict(self) -> dict[str, Any]:
        """The kept block means, by layer and frame."""
        return {str(layer): {str(frame): x for frame, x in kept.items()} for layer, kept in self._pooled.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()`."""
        self._pooled = {int(layer): {int(frame): x for frame, x in kept.items()} for layer, kept in state.items()}


def _best_blocks(scores: Tensor, chosen: Tensor, always: Tensor, keep: int) -> Tensor:
    """Bool `[B, H, nq, F, n]`: the `keep` best blocks of the chosen frames, one or more of each fixed frame.

    Args:
        scores: `[B, H, nq, F, n]`.
        chosen: bool `[B, H, nq, F]`.
        always: bool `[F]`.
        keep: blocks per row; at least one for each fixed frame.
    """
    first = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.argmax(-1, keepdim=True), True)
    first &= always.unsqueeze(-1)
    ranked = scores.masked_fill(~chosen.unsqueeze(-1), -torch.inf).masked_fill(first, torch.inf).flatten(-2)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[..., : max(keep, int(always.sum()))]
    kept = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True) & ~ranked.isneginf()
    return kept.unflatten(-1, scores.shape[-2:])
