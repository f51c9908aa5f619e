"""The loop of a stream in latent space: denoise a chunk, write it to the cache, change the prompt between chunks.

Axis legend: latents are `[B, C, F, h, w]`, normalised as the transformer sees them, fp32 between passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.pipelines.streaming.attention import CLEAN, Branch, DenseContext
from dit_accel.pipelines.streaming.ladder import Ladder
from dit_accel.pipelines.streaming.noise import NoiseSource
from dit_accel.pipelines.streaming.records import BRANCHES, StreamCalls
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings

SwitchMode = Literal["cut", "recache", "blend", "keep"]


@dataclass(frozen=True)
class Finished:
    """A chunk whose latents will not change any more.

    Args:
        frames: its latent frames.
        latents: `[B, C, F, h, w]`.
    """

    frames: range
    latents: Tensor


class ChunkDriver:
    """Makes one stream, chunk after chunk; memory does not grow once the window is full.

    Args:
        runtime: the transformer.
        settings: see `StreamSettings`.
        text: prompt embeddings `[B, L, C]`.
        negative: those of the negative prompt, needed when `guidance_scale` is above 1.
        size: (height, width) of the latents.
        seed: of the noise.
        policy: makes the attention policy of a branch. Default: dense.
        chunks: chunks to make; a rolling window winds down at the end. Default: endless.
    """

    def __init__(
        self,
        runtime: CausalWan,
        settings: StreamSettings,
        text: Tensor,
        size: tuple[int, int],
        seed: int = 0,
        negative: Tensor | None = None,
        policy: Callable[[], DenseContext] = DenseContext,
        chunks: int | None = None,
    ) -> None:
        self.runtime, self.settings, self.chunks = runtime, settings, chunks
        self.ladder = Ladder.of(settings)
        model = runtime.transformer
        self.device, self.dtype = model.device, model.dtype
        texts = [text] if negative is None or settings.guidance_scale <= 1 else [text, negative]
        self.branches = [runtime.branch(settings, self._to_model(x), policy) for x in texts]
        self.calls = StreamCalls()
        for name, branch in zip(BRANCHES, self.branches, strict=False):
            branch.name, branch.calls = name, self.calls
        self.noise = NoiseSource(seed, (text.shape[0], model.config.in_channels, *size), settings.antiphase)
        self.made = 0
        self.frame = 0
        self._unwritten: Finished | None = None
        self._recent: list[Finished] = []
        self._blend: tuple[Tensor, Tensor, int, int] | None = None

    def _to_model(self, x: Tensor) -> Tensor:
        return x.to(device=self.device, dtype=self.dtype)

    @property
    def bytes(self) -> int:
        """Bytes of caches, text and policies of all branches."""
        return sum(branch.bytes for branch in self.branches)

    def next(self) -> Finished | None:
        """Make the next chunk; None when the last one has been made."""
        if self.chunks is not None and self.made >= self.chunks:
            return None
        self.flush()
        self._step_blend()
        chunk = self._finish(self._make())
        self.made += 1
        return chunk

    def _make(self) -> Finished:
        """Denoise the next chunk."""
        frames = range(self.frame, self.frame + self._length())
        return Finished(frames, self._denoise(frames))

    def _length(self) -> int:
        """Frames of the next chunk."""
        first = self.settings.first_chunk if self.frame == 0 else None
        return first or self.settings.chunk

    def give(self, latents: Tensor) -> list[Finished]:
        """Take latents as the beginning, or the continuation, of the stream: they are cached as if they had been made.

        Args:
            latents: `[B, C, F, h, w]`, any number of frames.
        """
        given, at = [], 0
        while at < latents.shape[2]:
            self.flush()
            part = latents[:, :, at : at + self._length()]
            at += part.shape[2]
            frames = range(self.frame, self.frame + part.shape[2])
            given.append(self._finish(Finished(frames, part.to(self.device, torch.float32))))
        return given

    def _finish(self, chunk: Finished) -> Finished:
        self._unwritten = chunk
        self.calls.finish_chunk()
        self.frame = max(self.frame, chunk.frames.stop)
        self._recent.append(chunk)
        window = self.settings.window
        while window is not None and self._recent[0].frames.stop <= self.frame - window:
            self._recent.pop(0)
        return chunk

    def flush(self) -> None:
        """Write the last finished chunk to the caches; done at the next chunk, so the very last costs no pass."""
        if self._unwritten is not None:
            chunk, self._unwritten = self._unwritten, None
            for branch in self.branches:
                self._write(branch, chunk)

    def _write(self, branch: Branch, chunk: Finished) -> None:
        branch.policy.begin_chunk(chunk.frames)
        self.runtime.forward(
            branch, self._to_model(chunk.latents), self.settings.context_noise, chunk.frames.start, step=CLEAN
        )

    def _denoise(self, frames: range) -> Tensor:
        x = self.noise.draw(frames).to(self.device)
        for branch in self.branches:
            branch.policy.begin_chunk(frames)
        for step, timestep in enumerate(self.ladder.timesteps):
            velocity = self._velocity(x, timestep, frames.start, step=step)
            if self.settings.sampler == "euler":
                x = self.ladder.euler(x, velocity, step)
                continue
            x = self.ladder.clean(x, velocity, step)
            if step + 1 < len(self.ladder):
                x = self.ladder.noisy(x, self.noise.draw(frames, step + 1).to(self.device), step + 1)
        return x

    def _velocity(self, x: Tensor, timesteps: float | list[float], start: int, **options: Any) -> Tensor:
        """Output of the model, guided where there are two branches, fp32."""
        x = self._to_model(x)
        outs = [self.runtime.forward(branch, x, timesteps, start, **options).float() for branch in self.branches]
        return outs[0] if len(outs) == 1 else outs[1] + self.settings.guidance_scale * (outs[0] - outs[1])

    def switch(self, text: Tensor, mode: SwitchMode = "recache", over: int = 1) -> None:
        """Change the prompt from the next chunk on; what has been made stays as it is.

        Args:
            text: new prompt embeddings `[B, L, C]`.
            mode: "recache": the frames of the window are run once more under the new prompt (arXiv 2509.22622);
                "blend": the same, with embeddings that move to the new prompt over `over` chunks; "cut": the cache
                is emptied, and a new scene with a new sink begins; "keep": the text alone changes.
            over: chunks of a blend, the last of which has the new prompt alone.
        """
        self.flush()
        text = self._to_model(text)
        self._blend = None
        if mode == "blend":
            self._blend = (self.branches[0].text, text, 0, over)
            return
        self._apply(text, mode)

    def _step_blend(self) -> None:
        if self._blend is None:
            return
        old, new, done, over = self._blend
        share = (done + 1) / over
        self._blend = (old, new, done + 1, over) if done + 1 < over else None
        self._apply(new if share == 1 else torch.lerp(old, new, share), "recache")

    def _apply(self, text: Tensor, mode: SwitchMode) -> None:
        self.branches[0].set_text(text)
        if mode == "cut":
            self._recent.clear()
        for branch in self.branches:
            if mode == "cut":
                branch.cache.restart(self.frame)
            if mode != "keep":
                branch.policy.reset()
        # The negative prompt has not changed, and neither have its keys.
        if mode == "recache" and self._recent:
            self._recache(self.branches[0])

    def _recache(self, branch: Branch) -> None:
        """Run the frames of the window once more, in one pass ("released") or chunk by chunk ("causal")."""
        settings, cache = self.settings, branch.cache
        if settings.keep_sink:
            first = max(cache.ring_start, cache.oldest)
        else:
            kept = self._recent[0].frames.start if settings.window is None else self.frame - settings.window
            first = max(cache.origin, kept, self._recent[0].frames.start)
            cache.restart(first)
        chunks = [_from(chunk, first) for chunk in self._recent if chunk.frames.stop > first]
        if settings.recache == "released" and chunks:
            joined = torch.cat([chunk.latents for chunk in chunks], dim=2)
            chunks = [Finished(range(chunks[0].frames.start, self.frame), joined)]
        for chunk in chunks:
            self._write(branch, chunk)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the next chunk in another process; the settings are not in it."""
        self.flush()
        return {
            "made": self.made,
            "frame": self.frame,
            "noise": self.noise.state_dict(),
            "recent": [_pack(chunk) for chunk in self._recent],
            "blend": self._blend,
            "branches": [
                {"text": x.text, "cache": x.cache.state_dict(), "policy": x.policy.state_dict()} for x in self.branches
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()` of a driver with the same settings and model."""
        self.made, self.frame = state["made"], state["frame"]
        self.noise.load_state_dict(state["noise"])
        self._recent = [_unpack(chunk) for chunk in state["recent"]]
        self._unwritten = None
        self._blend = None if state["blend"] is None else tuple(state["blend"])
        for branch, saved in zip(self.branches, state["branches"], strict=True):
            branch.set_text(saved["text"])
            branch.cache.load_state_dict(saved["cache"])
            branch.policy.load_state_dict(saved["policy"])


def _from(chunk: Finished, first: int) -> Finished:
    """The part of a chunk that begins at frame `first` or later."""
    skip = max(0, first - chunk.frames.start)
    return Finished(range(chunk.frames.start + skip, chunk.frames.stop), chunk.latents[:, :, skip:])


def _pack(chunk: Finished) -> dict[str, Any]:
    return {"start": chunk.frames.start, "latents": chunk.latents}


def _unpack(chunk: dict[str, Any]) -> Finished:
    start, latents = chunk["start"], chunk["latents"]
    return Finished(range(start, start + latents.shape[2]), latents)
