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
    between steps stays independent.

    Args:
        seed: of the stream.
        shape: of one latent frame `(B, C, H, W)`.
        antiphase: rho in [0, 1). Default 0.
    """

    def __init__(self, seed: int, shape: tuple[int, ...], antiphase: float = 0.0) -> None:
        self.seed, self.shape, self.antiphase = seed, shape, antiphase
        self._last: tuple[int, Tensor] | None = None

    def draw(self, frames: range, step: int = INITIAL) -> Tensor:
        """Noise `[B, C, F, H, W]` of `frames` for `step`.

        Raises:
            ValueError: antiphase noise of frames that do not follow the last ones drawn.
        """
        if step == INITIAL and self.antiphase:
            drawn = [self._next_antiphase(frame) for frame in frames]
        else:
            drawn = [self._white(frame, step) for frame in frames]
        return torch.stack(drawn, dim=2)

    def _white(self, frame: int, step: int) -> Tensor:
        # A generator per frame and step: resuming and re-chunking need no state. The hash decorrelates neighbours.
        digest = hashlib.blake2b(f"{self.seed}/{frame}/{step}".encode(), digest_size=7).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
        return torch.randn(self.shape, generator=generator)

    def _next_antiphase(self, frame: int) -> Tensor:
        fresh = self._white(frame, INITIAL)
        if frame > 0:
            if self._last is None or self._last[0] != frame - 1:
                raise ValueError(f"antiphase noise of frame {frame} needs that of frame {frame - 1}, drawn just before")
            fresh = (1 - self.antiphase**2) ** 0.5 * fresh - self.antiphase * self._last[1]
        self._last = (frame, fresh)
        return fresh

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on: seed and the last frame drawn."""
        return {"seed": self.seed, "last": self._last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""
        self.seed, self._last = state["seed"], state["last"]
