"""A finished chunk of a stream, in latent space."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Finished:
    """A chunk whose latents will not change any more.

    Args:
        start: its first latent frame.
        latents: `[B, C, F, h, w]`.
    """

    start: int
    latents: Tensor

    @property
    def frames(self) -> range:
        """Its latent frames."""
        return range(self.start, self.start + self.latents.shape[2])

    def since(self, first: int) -> Finished:
        """The part that begins at frame `first` or later."""
        skip = max(0, first - self.start)
        return Finished(self.start + skip, self.latents[:, :, skip:])

    def state_dict(self) -> dict[str, Any]:
        """The arguments, for `Finished(**state)`."""
        return {"start": self.start, "latents": self.latents}
