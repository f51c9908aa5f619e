"""Causal training of the small model: chunks are batch entries, and each attends what a stream would show it.

A stream sees finished chunks clean and its own chunk noisy. Here each chunk of the past stands once more, clean, beside
the noisy ones that are learnt from (teacher forcing, as in arXiv 2412.07772), so that one pass teaches several chunks.
Axis legend: B clips, n entries of an excerpt, F frames of a chunk, S tokens of a frame, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.pipelines.streaming.positions import PositionRule, Rotary
from dit_accel.samples.cheap_attention import attend_in_half
from dit_accel.samples.tiny_wan_flow import contrast_gain, draw_levels, velocity_error
from dit_accel.streaming import StreamSettings

_ROUGH_SHARE = 0.5  # of the excerpts: their past is what the model itself makes of it
_ROUGH_LEVEL = 0.8  # noise from which the past is made in one step, at most


@dataclass(frozen=True)
class Excerpt:
    """Chunks of a clip, those of the past first.

    Args:
        chunks: frames of every entry; one chunk may stand in it as past and as noisy.
        given: entries that are the past.
        keys: per entry the frames it attends, as places in the excerpt: entry * F + frame of the chunk.
        positions: per entry the temporal positions of those frames; the last F are its own.
    """

    chunks: tuple[range, ...]
    given: int
    keys: tuple[tuple[int, ...], ...]
    positions: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, settings: StreamSettings, first: int, last: int) -> Excerpt:
        """The first chunk of a clip, for the sink, and chunks `first` to `last`.

        Learnt from are the chunks all of whose visible past is in the excerpt; `first=1` makes these all of them.

        Args:
            settings: chunk, window, sink and positions of the stream.
            first, last: numbers of chunks, 1 <= first <= last + 1.
        """
        seen = visible_frames(settings, last + 1)
        past = [0, *range(first, last)]
        inside = {frame for chunk in past for frame in _frames(settings, chunk)}
        learnt = [c for c in [0, *range(first, last + 1)] if set(seen[c]) <= inside | set(_frames(settings, c))]
        place = {frame: at for at, frame in enumerate(f for c in past for f in _frames(settings, c))}
        rule = PositionRule(settings.positions, settings.sink, max_frames=10**9)
        keys, positions = [], []
        for entry, chunk in enumerate([*past, *learnt]):
            own = _frames(settings, chunk)
            shown = [f for f in seen[chunk] if f in inside and f < own.start]
            keys.append((*(place[f] for f in shown), *(entry * settings.chunk + i for i in range(len(own)))))
            positions.append(tuple(rule.of([*shown, *own], 0)))
        chunks = tuple(_frames(settings, chunk) for chunk in [*past, *learnt])
        return cls(chunks, len(past), tuple(keys), tuple(positions))

    def past(self) -> Excerpt:
        """The entries of the past alone."""
        n = self.given
        return Excerpt(self.chunks[:n], n, self.keys[:n], self.positions[:n])

    def cut(self, clip: Tensor, axis: int) -> Tensor:
        """The chunks of `clip`, whose `axis` counts frames, as entries: `[B, ...]` to `[B, n, ...]`."""
        return torch.stack([clip.narrow(axis, x.start, len(x)) for x in self.chunks], dim=1)


def _frames(settings: StreamSettings, chunk: int) -> range:
    return range(chunk * settings.chunk, (chunk + 1) * settings.chunk)


def visible_frames(settings: StreamSettings, chunks: int) -> list[list[int]]:
    """The frames that each of the first chunks of a stream attends, its own last, as the stream's cache says."""
    cache, seen = FrameCache(0, settings.window, settings.sink), []
    for chunk in range(chunks):
        frames = _frames(settings, chunk)
        cache.make_room(frames)
        seen.append(cache.visible(frames))
        cache.commit(frames)
    return seen


class ChunkAttention:
    """Self-attention of training: batch entries are chunks and attend those that the excerpt says.

    Args:
        rotary: rotates queries and keys, as in a stream.
        grid: (height, width) of a frame in tokens.
        is_half: attend in bfloat16, see `attend_in_half`. Default False.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, rotary: Rotary, grid: tuple[int, int], is_half: bool = False) -> None:
        self.rotary, self.grid = rotary, grid
        self.attend = attend_in_half if is_half else F.scaled_dot_product_attention
        self.excerpt: Excerpt | None = None

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend `hidden_states` `[B * n, F * S, C]`; the other arguments are those of Diffusers' processor."""
        if self.excerpt is None:
            raise RuntimeError("ChunkAttention: set `excerpt` before the pass")
        entries = len(self.excerpt.chunks)
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        q, k = self.rotary.space(q, self.grid), self.rotary.space(k, self.grid)
        q = q.unflatten(0, (-1, entries))
        k, v = (x.unflatten(1, (-1, self._frame_tokens)).unflatten(0, (-1, entries)).flatten(1, 2) for x in (k, v))
        outs = [self._attend(entry, q[:, entry], k, v) for entry in range(entries)]
        projected: Tensor = attn.to_out[0](torch.stack(outs, dim=1).flatten(0, 1))
        return projected

    @property
    def _frame_tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    def _attend(self, entry: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One entry: q `[B, F * S, H, D]` over the frames k, v `[B, n * F, S, H, D]`, to `[B, F * S, H * D]`."""
        assert self.excerpt is not None
        rows, positions = list(self.excerpt.keys[entry]), self.excerpt.positions[entry]
        own = len(self.excerpt.chunks[entry])
        q = self.rotary.time(q, positions[-own:])
        keys, values = self.rotary.time(k[:, rows].flatten(1, 2), positions), v[:, rows].flatten(1, 2)
        q, keys, values = (x.transpose(1, 2) for x in (q, keys, values))
        return self.attend(q, keys, values).transpose(1, 2).flatten(2)


class CausalTeacher:
    """The loss of a transformer whose self-attention is causal over chunks.

    Args:
        model: the transformer; its self-attention processors are replaced.
        grid: (height, width) of a frame in tokens.
        shift: of the noise levels.
        is_half: attend in bfloat16, see `attend_in_half`. Default False.
    """

    def __init__(
        self, model: WanTransformer3DModel, grid: tuple[int, int], shift: float, is_half: bool = False
    ) -> None:
        self.model, self.shift = model, shift
        self.attention = ChunkAttention(Rotary(model.rope), grid, is_half)
        stock = model.attn_processors
        model.set_attn_processor({name: self.attention if "attn1" in name else p for name, p in stock.items()})

    def velocity(self, excerpt: Excerpt, chunks: Tensor, levels: Tensor, text: Tensor) -> Tensor:
        """The model's velocity `[B, n, C, F, h, w]` of noisy `chunks` at noise `levels` `[B, n]`, text `[B, L, C]`."""
        self.attention.excerpt = excerpt
        out: Tensor = self.model(
            hidden_states=chunks.flatten(0, 1),
            timestep=levels.flatten() * 1000,
            encoder_hidden_states=text.repeat_interleave(chunks.shape[1], dim=0),
            return_dict=False,
        )[0]
        return out.unflatten(0, chunks.shape[:2])

    def loss(self, excerpt: Excerpt, latents: Tensor, objects: Tensor, text: Tensor) -> Tensor:
        """Flow-matching loss of the chunks that `excerpt` learns from.

        Args:
            excerpt: which chunks.
            latents: clean clips `[B, C, T, h, w]`.
            objects: where errors weigh more, bool `[B, T, h, w]`.
            text: `[B, L, C]`.
        """
        chunks, given = excerpt.cut(latents, 2), excerpt.given
        batch, entries = chunks.shape[:2]
        past = chunks[:, :given]
        if torch.rand(()) < _ROUGH_SHARE:
            past = self.remake(excerpt.past(), past, text)
        learnt = chunks[:, given:]
        level = draw_levels(batch * (entries - given), self.shift).view(batch, -1).to(latents.device)
        noise = torch.randn_like(learnt)
        levels = torch.cat([level.new_zeros(batch, given), level], dim=1)
        noisy = mix(learnt, noise, level)
        predicted = self.velocity(excerpt, torch.cat([past, noisy], dim=1), levels, text)[:, given:]
        where = excerpt.cut(objects, 1)[:, given:]
        gain = contrast_gain(latents, objects).repeat_interleave(entries - given, dim=0)
        found, wanted, where = (x.flatten(0, 1) for x in (predicted.float(), noise - learnt, where))
        return velocity_error(found, wanted, where, gain)

    @torch.no_grad()
    def remake(self, excerpt: Excerpt, past: Tensor, text: Tensor) -> Tensor:
        """What the model makes in one step of the noisy chunks `past` `[B, n, C, F, h, w]`, but for the first.

        A stream continues from its own chunks, whose errors no clean clip has. Trained on these, the model takes colour
        and shape from the sink and only place and motion from the rest. Noise levels are drawn chunk by chunk, as in
        diffusion forcing (arXiv 2407.01392).
        """
        levels = _ROUGH_LEVEL * torch.rand(past.shape[:2]).to(past.device)
        levels[:, 0] = 0
        noisy = mix(past, torch.randn_like(past), levels)
        return noisy - _spread(levels) * self.velocity(excerpt, noisy, levels, text)


def mix(clean: Tensor, noise: Tensor, levels: Tensor) -> Tensor:
    """(1 - level) clean + level noise, `[B, n, C, F, h, w]` at levels `[B, n]`."""
    return torch.lerp(clean, noise, _spread(levels))


def _spread(levels: Tensor) -> Tensor:
    return levels[:, :, None, None, None, None]


def draw_excerpt(excerpts: Sequence[Sequence[Excerpt]], generator: torch.Generator | None = None) -> Excerpt:
    """One of a kind of excerpts, each kind as often: from the start of the clip, or from later."""
    kind = excerpts[int(torch.randint(len(excerpts), (), generator=generator))]
    return kind[int(torch.randint(len(kind), (), generator=generator))]
