"""The shapes that are timed, those of presets and small ones for the CPU, and inputs that look like video."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.errors import ConfigError, near_matches
from dit_accel.layout import TokenLayout


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


SMALL_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("cpu-1k", TokenLayout((4, 16, 16)), 12, 64, "no model: 1024 tokens"),
        Shape("cpu-4k", TokenLayout((4, 32, 32)), 12, 64, "no model: 4096 tokens"),
        Shape("cpu-8k", TokenLayout((8, 32, 32)), 12, 64, "no model: 8192 tokens"),
        Shape("cpu-8k-text", TokenLayout((8, 32, 31), 256, "after"), 12, 128, "no model: 7936 tokens, 256 of text"),
    )
}

MODEL_SHAPES = {
    shape.name: shape
    for shape in (
        Shape("wan-1.3b", TokenLayout((21, 30, 52)), 12, 128, "Wan 2.1 1.3B, 480 x 832, 81 frames"),
        Shape("wan-14b", TokenLayout((21, 45, 80)), 40, 128, "Wan 2.1 14B, 720 x 1280, 81 frames"),
        Shape("hunyuan", TokenLayout((33, 45, 80), 256, "after"), 24, 128, "HunyuanVideo, 720 x 1280, 129 frames"),
        Shape("cogvideox", TokenLayout((13, 30, 45), 226, "before"), 48, 64, "CogVideoX 5B, 480 x 720, 49 frames"),
        Shape("flux-1k", TokenLayout((1, 64, 64), 512, "before"), 24, 128, "FLUX.1, 1024 x 1024"),
        Shape("flux-2k", TokenLayout((1, 128, 128), 512, "before"), 24, 128, "FLUX.1, 2048 x 2048"),
        Shape("flux-4k", TokenLayout((1, 256, 256), 512, "before"), 24, 128, "FLUX.1, 4096 x 4096"),
    )
}
"""The shapes that kernels are judged by."""


def list_shapes() -> list[str]:
    """The small shapes, those of models, and the recommended preset of every model."""
    from dit_accel.presets import list_presets

    return [*SMALL_SHAPES, *MODEL_SHAPES, *(name for name in list_presets() if "/" not in name)]


def find_shape(name: str) -> Shape:
    """A small shape, that of a model, or that of a preset at its own size.

    Raises:
        ConfigError: there is none; the message offers near matches.
    """
    if name in SMALL_SHAPES or name in MODEL_SHAPES:
        return (SMALL_SHAPES | MODEL_SHAPES)[name]
    # Kernels are measured on machines that have torch alone, too.
    from dit_accel.estimate import token_layout
    from dit_accel.presets import list_presets, load_preset

    if name not in list_presets() and not name.endswith((".yaml", ".yml")):
        raise ConfigError("--shapes", f"unknown shape {name!r}{near_matches(name, list_shapes())}")
    preset = load_preset(name)
    sizes, made = preset.model, preset.generation
    size = f"{made.height} x {made.width}" + (f", {made.num_frames} frames" if made.num_frames > 1 else "")
    return Shape(name, token_layout(sizes, made), sizes.heads, sizes.head_dim, f"{preset.description}: {size}")


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
