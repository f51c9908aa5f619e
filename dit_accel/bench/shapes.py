"""The shapes that are timed: those of published models, and small ones for the CPU; and inputs that look like video."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ConfigError, near_matches
from dit_accel.layout import TextPosition, TokenLayout


@dataclass(frozen=True)
class Shape:
    """One attention call of a model.

    Args:
        name: how it is asked for.
        layout: token geometry.
        heads, head_dim: of the model.
        of: which model and size.
    """

    name: str
    layout: TokenLayout
    heads: int
    head_dim: int
    of: str


def _shape(
    name: str,
    grid: tuple[int, int, int],
    heads: int,
    head_dim: int,
    of: str,
    text: int = 0,
    where: TextPosition = "none",
) -> Shape:
    return Shape(name, TokenLayout(grid, text, where), heads, head_dim, of)


# Grids follow from pixels and frames by the compression of each model's autoencoder and its patch size.
SHAPES = {
    shape.name: shape
    for shape in (
        _shape("cpu-1k", (4, 16, 16), 12, 64, "no model: 1024 tokens"),
        _shape("cpu-4k", (4, 32, 32), 12, 64, "no model: 4096 tokens"),
        _shape("cpu-8k", (8, 32, 32), 12, 64, "no model: 8192 tokens"),
        _shape("cpu-8k-text", (8, 32, 31), 12, 128, "no model: 7936 tokens and 256 of text", 256, "after"),
        _shape("tiny-wan", (11, 16, 16), 4, 64, "the small model that ships, 21 frames of 64 x 64"),
        _shape("wan-1.3b-480p", (21, 30, 52), 12, 128, "Wan 2.1 1.3B, 81 frames of 480 x 832"),
        _shape("wan-14b-480p", (21, 30, 52), 40, 128, "Wan 2.1 14B, 81 frames of 480 x 832"),
        _shape("wan-14b-720p", (21, 45, 80), 40, 128, "Wan 2.1 14B, 81 frames of 720 x 1280"),
        _shape("hunyuan-720p", (33, 45, 80), 24, 128, "HunyuanVideo, 129 frames of 720 x 1280", 256, "after"),
        _shape("flux-1024", (1, 64, 64), 24, 128, "FLUX.1, 1024 x 1024", 512, "before"),
        _shape("flux-2048", (1, 128, 128), 24, 128, "FLUX.1, 2048 x 2048", 512, "before"),
        _shape("flux-4096", (1, 256, 256), 24, 128, "FLUX.1, 4096 x 4096", 512, "before"),
        _shape("cogvideox-5b", (13, 30, 45), 48, 64, "CogVideoX 5B, 49 frames of 480 x 720", 226, "before"),
    )
}


def find_shape(name: str) -> Shape:
    """The shape called `name`.

    Raises:
        ConfigError: there is none; the message offers near matches.
    """
    if name not in SHAPES:
        raise ConfigError("--shapes", f"unknown shape {name!r}{near_matches(name, SHAPES)}")
    return SHAPES[name]


def structured_qkv(
    layout: TokenLayout, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[1, heads, N, head_dim]` that vary smoothly over the video, with noise.

    Near tokens resemble each other, as in a video, so that methods that look at queries and keys find structure.
    Queries and keys share their waves; text tokens are plain noise.

    Args:
        layout: token geometry.
        heads, head_dim: sizes.
        device, dtype: of the result; it is drawn on the CPU, so that every device gets the same.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    at = layout.coordinates.float() / torch.tensor(layout.grid)
    waves = 2 * math.pi * torch.randn(heads, 3, head_dim, generator=generator) * torch.tensor([2.0, 3.0, 3.0])[:, None]
    phase = 2 * math.pi * torch.rand(heads, 1, head_dim, generator=generator)
    smooth = math.sqrt(2) * (at @ waves + phase).cos()
    made = []
    for noise in (0.5, 0.5, 1.0):
        x = torch.randn(1, heads, layout.tokens, head_dim, generator=generator)
        x[:, :, layout.video_slice()] = noise * x[:, :, layout.video_slice()] + smooth
        made.append(x.to(device, dtype))
    return made[0], made[1], made[2]
