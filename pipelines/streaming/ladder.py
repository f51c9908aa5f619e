"""The noise ladder of a chunk: warped timesteps, noise levels, and the steps between clean and noisy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_accel.streaming import StreamSettings
from dit_accel.widest import widened

TRAIN_TIMESTEPS = 1000.0


@dataclass(frozen=True)
class Ladder:
    """Timesteps from noisy to clean. The noise level of timestep t is sigma = t / 1000: x = (1 - sigma) x0 + sigma eps.

    Args:
        timesteps: after warping, falling.
    """

    timesteps: tuple[float, ...]

    @classmethod
    def of(cls, settings: StreamSettings) -> Ladder:
        """The ladder of `settings`; a flow shift s maps u = t / 1000 to s u / (1 + (s - 1) u)."""
        if not settings.warp:
            return cls(settings.steps)
        s = settings.shift
        shares = (t / TRAIN_TIMESTEPS for t in settings.steps)
        return cls(tuple(TRAIN_TIMESTEPS * s * u / (1 + (s - 1) * u) for u in shares))

    def __len__(self) -> int:
        return len(self.timesteps)

    def sigma(self, step: int) -> float:
        """Noise level of a step; 0 after the last."""
        return self.timesteps[step] / TRAIN_TIMESTEPS if step < len(self.timesteps) else 0.0

    def clean(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """x0 = x - sigma v, in fp64; x and the model's velocity (noise - x0) have one shape, the result x's dtype."""
        return (widened(x) - self.sigma(step) * widened(velocity)).to(x.dtype)

    def noisy(self, clean: Tensor, noise: Tensor, step: int) -> Tensor:
        """x at `step` from a clean sample and fresh noise."""
        sigma = self.sigma(step)
        return ((1 - sigma) * widened(clean) + sigma * widened(noise)).to(clean.dtype)

    def euler(self, x: Tensor, velocity: Tensor, step: int) -> Tensor:
        """x at `step + 1` by an Euler step of the probability-flow ODE."""
        return (widened(x) + (self.sigma(step + 1) - self.sigma(step)) * widened(velocity)).to(x.dtype)
