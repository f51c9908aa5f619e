"""Causal passes through an unmodified `WanTransformer3DModel`, one chunk at a time.

The parameters and the class are Diffusers' own; only the attention processors are replaced, and they fall back to the
replaced ones outside a stream. Good video needs weights that were trained to be causal (arXiv 2412.07772, 2506.08009).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.streaming.attention import (
    CLEAN,
    Branch,
    DenseContext,
    Pass,
)
from dit_accel.pipelines.streaming.cache import FrameCache
from dit_accel.pipelines.streaming.positions import PositionRule, Rotary
from dit_accel.pipelines.streaming.processors import CachedCrossAttention, CausalSelfAttention
from dit_accel.streaming import StreamSettings

_STOCK = "WanAttnProcessor"


class CausalWan:
    """Runs causal passes; any number of streams may share one transformer.

    Args:
        transformer: a text-to-video `WanTransformer3DModel` with Diffusers' own processors.

    Raises:
        UnsupportedError: another class, other processors, image cross-attention, or patches that span frames.
    """

    now: Pass | None = None

    def __init__(self, transformer: Any) -> None:
        self.transformer = transformer
        _check_model(transformer)
        self._replaced: list[tuple[Any, Any]] = []
        for layer, block in enumerate(transformer.blocks):
            self._replace(block.attn1, CausalSelfAttention(self, layer, block.attn1.processor))
            self._replace(block.attn2, CachedCrossAttention(self, layer, block.attn2.processor))

    def _replace(self, module: Any, processor: Any) -> None:
        self._replaced.append((module, module.processor))
        module.set_processor(processor)

    def close(self) -> None:
        """Put the replaced processors back; no pass can run after that."""
        for module, processor in self._replaced:
            module.set_processor(processor)
        self._replaced.clear()

    def __enter__(self) -> CausalWan:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def layers(self) -> int:
        """Number of transformer blocks."""
        return len(self.transformer.blocks)

    def branch(
        self, settings: StreamSettings, text: Tensor, policy: Callable[[], DenseContext] = DenseContext
    ) -> Branch:
        """A new, empty branch.

        Args:
            settings: window, sink, positions.
            text: prompt embeddings `[B, L, C]`.
            policy: makes the attention policy of the branch.
        """
        rotary = Rotary(self.transformer.rope, settings.frequencies)
        rule = PositionRule(settings.positions, settings.sink, rotary.max_frames)
        # A rolling window is not stored: the ring holds finished frames only, a whole window of them beside the sink.
        kept = settings.window
        if kept is not None and settings.rolling:
            kept += settings.sink
        cache = FrameCache(self.layers, kept, settings.sink, settings.sink_decay)
        return Branch(cache, rule, rotary, text, policy())

    @torch.no_grad()
    def forward(
        self,
        branch: Branch,
        latents: Tensor,
        timesteps: float | Sequence[float],
        start: int,
        *,
        step: int = CLEAN,
        write: bool = True,
        past: Sequence[int] | None = None,
    ) -> Tensor:
        """One pass over consecutive frames, which see the cache and each other.

        Args:
            branch: whose cache and text are used.
            latents: `[B, C, F, H, W]`.
            timesteps: one for all frames, or one per frame.
            start: index of the first frame in the stream.
            step: place in the noise ladder; `CLEAN` (default) for finished frames, whose keys then count as cached.
            write: whether keys and values go to the cache. Default True.
            past: cached frames to attend. Default: what the window shows.

        Returns:
            The model's output (velocity) `[B, C, F, H, W]`.

        Raises:
            UnsupportedError: after `close`.
        """
        if not self._replaced:
            raise UnsupportedError(
                "streaming: the stream has ended, since Diffusers' attention processors were put back; begin a new one"
            )
        frames = range(start, start + latents.shape[2])
        cache = branch.cache
        grid = self.grid(latents)
        if write:
            cache.make_room(frames, lambda layer, frame, k, v: branch.evict(layer, frame, k, v, grid))
        if past is None:
            past = [frame for frame in cache.visible(frames) if frame < start]
        outer, self.now = self.now, Pass(branch, frames, tuple(past), step, write, grid)
        try:
            out: Tensor = self.transformer(
                hidden_states=latents,
                timestep=_timestep(timesteps, latents, grid[0] * grid[1]),
                encoder_hidden_states=branch.text,
                return_dict=False,
            )[0]
        finally:
            self.now = outer
        if write and step == CLEAN:
            cache.commit(frames)
        return out

    def grid(self, latents: Tensor) -> tuple[int, int]:
        """(height, width) in tokens of a frame of latents `[B, C, F, H, W]`."""
        _, height, width = self.transformer.config.patch_size
        return latents.shape[3] // height, latents.shape[4] // width


def _timestep(timesteps: float | Sequence[float], latents: Tensor, frame_tokens: int) -> Tensor:
    """fp32 `[B]`, or per token `[B, F * S]` where frames differ."""
    batch = latents.shape[0]
    values = [timesteps] * latents.shape[2] if isinstance(timesteps, int | float) else list(timesteps)
    if len(set(values)) == 1:
        return torch.full((batch,), values[0], dtype=torch.float32, device=latents.device)
    per_token = torch.tensor(values, dtype=torch.float32, device=latents.device).repeat_interleave(frame_tokens)
    return per_token.expand(batch, -1)


def _check_model(transformer: Any) -> None:
    found = type(transformer).__name__
    if found != "WanTransformer3DModel":
        raise UnsupportedError(f"streaming: expected a WanTransformer3DModel, got {found}")
    if transformer.config.patch_size[0] != 1:
        raise UnsupportedError(
            f"streaming: expected patches of one frame, got patch_size {tuple(transformer.config.patch_size)}"
        )
    if transformer.config.added_kv_proj_dim is not None:
        raise UnsupportedError("streaming: image-to-video weights attend to image tokens; use text-to-video weights")
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UnsupportedError(
            "streaming under Diffusers' context parallelism: every rank would hold only a part of a chunk; run one "
            "stream per device instead"
        )
    processors = {type(x.processor).__name__ for block in transformer.blocks for x in (block.attn1, block.attn2)}
    if processors != {_STOCK}:
        raise UnsupportedError(
            f"streaming: expected Diffusers' own {_STOCK}, found {', '.join(sorted(processors))}; remove the other "
            "processors first (for example close the runtime that is attached, or acceleration.remove())"
        )
