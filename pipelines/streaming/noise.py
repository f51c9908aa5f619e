"""Noise that depends on the seed, the frame and the step alone, however the stream is cut into chunks or resumed."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

INITIAL = -1
"""The step of a frame's initial noise; re-noising before step j of the ladder has step j."""


class NoiseSource:
    """Standard normal noise, frame by frame, fp32 on the CPU.

    With `antiphase` rho the initial noise follows eps_f = -rho eps_{f-1} + sqrt(1 - rho²) xi_f: every frame stays
    exactly N(0, I), and energy moves to high temporal frequencies (our reading of arXiv 2602.14027). Re-noising
    between steps stays independent. The recursion begins at frame 0, also where frames were given and not generated.

    Args:
        seed: of the stream.
        shape: of one latent frame `(B, C, H, W)`.
        antiphase: rho in [0, 1). Default 0.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], antiphase: float = 0.0) -> None:
        self.seed, self.shape, self.antiphase = seed, shape, antiphase
        self._kept: dict[int, Tensor] = {}

    def draw(self, frames: range, step: int = INITIAL) -> Tensor:
        """Noise `[B, C, F, H, W]` of `frames`, one or more, for `step`; equal however often they are drawn."""
        if step == INITIAL and self.antiphase:
            drawn = self._draw_antiphase(frames)
        else:
            drawn = [self._white(frame, step) for frame in frames]
        return torch.stack(drawn, dim=2)

    def _white(self, frame: int, step: int) -> Tensor:
        # A generator per frame and step: resuming and re-chunking need no state. The hash decorrelates neighbours.
        digest = hashlib.blake2b(f"{self.seed}/{frame}/{step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.randn(self.shape, generator=generator)

    def _draw_antiphase(self, frames: range) -> list[Tensor]:
        """The recursion from the nearest kept frame before `frames`; kept are that before them, and their last."""
        chain = {frame: x for frame, x in self._kept.items() if frame < frames.start}
        for frame in range(max(chain, default=-1) + 1, frames.stop):
            white = self._white(frame, INITIAL)
            rho = self.antiphase
            chain[frame] = white if frame == 0 else (1 - rho**2) ** 0.5 * white - rho * chain[frame - 1]
            if frame < frames.start:
                chain.pop(frame - 1, None)
        # A pass that fails is repeated with the same frames: what they follow must stay at hand.
        self._kept = {frame: chain[frame] for frame in (frames.start - 1, frames.stop - 1) if frame in chain}
        return [chain[frame] for frame in frames]

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: the seed and the kept frames."""
        return {"seed": self.seed, "kept": list(self._kept.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.seed, self._kept = state["seed"], dict(state["kept"])
