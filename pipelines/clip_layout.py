"""How overlapping clips cover a video of several prompts (DiTCtrl, arXiv 2412.18597)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ConfigError

_TRANSITIONS = (2, 1, 3)  # the authors' recommendation, and what fills a length better


@dataclass(frozen=True)
class ClipLayout:
    """How clips cover a video, and which prompts they show.

    Args:
        prompts: number of prompts.
        tile: latent frames of a clip, those that the model was trained with. Default 13 (CogVideoX-2B).
        overlap: latent frames that neighbouring clips share. Default 9.
        transitions: clips between two prompts, whose embeddings are mixed. Default 2.

    Raises:
        ConfigError: an overlap that is not below the tile, or counts that make no video.
    """

    prompts: int
    tile: int = 13
    overlap: int = 9
    transitions: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < self.tile:
            raise ConfigError("overlap", f"expected 0 to {self.tile - 1} frames, got {self.overlap}")
        if self.prompts < 1 or self.transitions < 0:
            raise ConfigError("prompts", f"expected at least one, and no negative transitions, got {self}")

    @property
    def clips(self) -> int:
        """Number of clips."""
        return self.prompts + self.transitions * (self.prompts - 1)

    @property
    def frames(self) -> int:
        """Latent frames of the video."""
        return self.tile + (self.clips - 1) * (self.tile - self.overlap)

    def clip(self, index: int) -> slice:
        """The latent frames of a clip."""
        start = index * (self.tile - self.overlap)
        return slice(start, start + self.tile)

    def mixture(self, index: int) -> tuple[int, float]:
        """Prompt p and share u: the clip shows (1 - u) of prompt p and u of prompt p + 1."""
        prompt, step = divmod(index, self.transitions + 1)
        return prompt, step / (self.transitions + 1)

    def weights(self) -> Tensor:
        """Triangular weight of each frame of a clip in the blend, fp32 `[tile]`, in (0, 1]."""
        place = (torch.arange(self.tile) + 0.5) * 2 / self.tile
        return torch.minimum(place, 2 - place)

    @classmethod
    def covering(cls, prompts: int, frames: int, tile: int = 13, overlap: int = 9) -> tuple[ClipLayout, list[int]]:
        """The shortest layout of at least `frames` latent frames in which every prompt holds for about as long.

        Args:
            prompts: number of different prompts.
            frames: latent frames wanted.
            tile, overlap: as in the layout.

        Returns:
            The layout, and for each of its prompts which of the different ones it is: `[0, 0, 1]` shows the first one
            for two clips.

        Raises:
            ConfigError: no prompts, or clips that make no video.
        """
        found: list[ClipLayout] = []
        for transitions in _TRANSITIONS:
            layout = cls(prompts, tile, overlap, transitions)
            while layout.frames < frames:
                layout = cls(layout.prompts + 1, tile, overlap, transitions)
            found.append(layout)
        best = min(found, key=lambda layout: layout.frames)
        times, longer = divmod(best.prompts, prompts)
        return best, [index for index in range(prompts) for _ in range(times + (index < longer))]
