"""The loop of a stream in latent space: denoise a chunk, write it to the cache, change the prompt between chunks.

Axis legend: latents are `[B, C, F, h, w]`, normalised as the transformer sees them, fp32 between passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from dit_accel.pipelines.streaming.attention import CLEAN, Branch, DenseContext
from dit_accel.pipelines.streaming.finished import Finished
from dit_accel.pipelines.streaming.ladder import Ladder
from dit_accel.pipelines.streaming.noise import NoiseSource
from dit_accel.pipelines.streaming.records import BRANCHES, StreamCalls
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.pipelines.streaming.states import check_origin
from dit_accel.streaming import StreamSettings

_SHAPE_OF_MODEL = ("num_layers", "num_attention_heads", "attention_head_dim", "text_dim")
SwitchMode = Literal["cut", "recache", "blend", "keep"]


class ChunkDriver:
    """Makes one stream, chunk after chunk; memory does not grow once the window is full.

    Whatever is called may be called once more after a pass that raised: the stream goes on as if it had not.

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
        self._blended: int | None = None

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
        return Finished(frames.start, self._denoise(frames))

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
            given.append(self._finish(Finished(self.frame, part.to(self.device, torch.float32))))
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
            for branch in self.branches:
                self._write(branch, self._unwritten)
            self._unwritten = None

    def _write(self, branch: Branch, chunk: Finished) -> None:
        branch.policy.begin_chunk(chunk.frames)
        self.runtime.forward(
            branch, self._to_model(chunk.latents), self.settings.context_noise, chunk.start, step=CLEAN
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

    def _velocity(
        self,
        x: Tensor,
        timesteps: float | list[float],
        start: int,
        past: Callable[[Branch], Sequence[int]] | None = None,
        **options: Any,
    ) -> Tensor:
        """Output of the model, guided where there are two branches, fp32; `past` says what a branch attends."""
        x = self._to_model(x)
        outs = [
            self.runtime.forward(branch, x, timesteps, start, past=past and past(branch), **options).float()
            for branch in self.branches
        ]
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
        self._blend = self._blended = None
        if mode == "blend":
            self._blend = (self.branches[0].text, text, 0, over)
            return
        self._apply(text, mode)

    def _step_blend(self) -> None:
        """Move the prompt for the next chunk, once."""
        if self._blend is None or self._blended == self.made:
            return
        old, new, done, over = self._blend
        share = (done + 1) / over
        self._apply(new if share == 1 else torch.lerp(old, new, share), "recache")
        self._blended = self.made
        self._blend = (old, new, done + 1, over) if done + 1 < over else None

    def _apply(self, text: Tensor, mode: SwitchMode) -> None:
        self.branches[0].set_text(text)
        if mode == "cut":
            self._recent.clear()
        for branch in self.branches:
            if mode == "cut":
                branch.cache.restart(self.frame)
            if mode != "keep":
                branch.policy.reset()
        if mode == "recache" and self._recent:
            # The keys of the negative prompt have not changed: they must go only where the sink goes.
            for branch in self.branches[:1] if self.settings.keep_sink else self.branches:
                self._recache(branch)

    def _recache(self, branch: Branch) -> None:
        """Run the frames of the window once more, in one pass ("released") or chunk by chunk ("causal")."""
        settings, cache = self.settings, branch.cache
        if settings.keep_sink:
            first = max(cache.ring_start, cache.oldest)
        else:
            kept = self._recent[0].start if settings.window is None else self.frame - settings.window
            first = max(cache.origin, kept, self._recent[0].start)
            cache.restart(first)
        chunks = [chunk.since(first) for chunk in self._recent if chunk.frames.stop > first]
        if settings.recache == "released" and chunks:
            chunks = [Finished(chunks[0].start, torch.cat([chunk.latents for chunk in chunks], dim=2))]
        for chunk in chunks:
            self._write(branch, chunk)

    @property
    def origin(self) -> dict[str, Any]:
        """What a stream must have in common with this one to take over its state."""
        config = self.runtime.transformer.config
        return {
            "settings": self.settings.model_dump(mode="json", fallback=str),
            "latents": list(self.noise.shape),
            "model": {name: config[name] for name in _SHAPE_OF_MODEL} | {"dtype": str(self.dtype)},
            "policies": [branch.policy.name for branch in self.branches],
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on with the next chunk in another process."""
        self.flush()
        return {
            "origin": self.origin,
            "made": self.made,
            "frame": self.frame,
            "noise": self.noise.state_dict(),
            "recent": [chunk.state_dict() for chunk in self._recent],
            "blend": self._blend,
            "blended": self._blended,
            "branches": [
                {"text": x.text, "cache": x.cache.state_dict(), "policy": x.policy.state_dict()} for x in self.branches
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over `state_dict()` of a driver with the same settings, size and model, whatever this one has made.

        Raises:
            ConfigError: they differ; nothing has been taken over.
        """
        check_origin(state.get("origin"), self.origin)
        self.made, self.frame = state["made"], state["frame"]
        self.noise.load_state_dict(state["noise"])
        self._recent = [Finished(**chunk) for chunk in state["recent"]]
        self._unwritten, self._blended = None, state["blended"]
        self._blend = None if state["blend"] is None else tuple(state["blend"])
        for branch, saved in zip(self.branches, state["branches"], strict=True):
            branch.set_text(saved["text"])
            branch.cache.load_state_dict(saved["cache"])
            branch.policy.reset()
            branch.policy.load_state_dict(saved["policy"])
