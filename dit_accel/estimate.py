"""Token counts and the gain that Amdahl's law allows, from a preset alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_accel.head_table import HeadTable
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.presets.schema import Generation, ModelFacts, Preset
from dit_accel.state import CallContext

EFFICIENCY = 0.7
"""Speed of sparse block attention relative to the dense baseline, per computed pair (the default assumption)."""
OVERHEAD = 0.03
"""Time of ordering and selecting, as a share of dense attention time (the default assumption)."""


@dataclass(frozen=True)
class Estimate:
    """What a preset can gain.

    Args:
        grid: (frames, height, width) in tokens.
        attention_share: share of the transformer's operations that is self-attention, when dense.
        density: expected density of the sparse calls; None where only a run can tell.
        dense_share: share of the calls that the schedule makes dense.
        gain: predicted speed-up of the denoising loop; None where the density is not known.
    """

    grid: tuple[int, int, int]
    attention_share: float
    density: float | None
    dense_share: float
    gain: float | None

    @property
    def tokens(self) -> int:
        """Length of the video sequence."""
        return self.grid[0] * self.grid[1] * self.grid[2]


def token_grid(model: ModelFacts, generation: Generation) -> tuple[int, int, int]:
    """Grid of video tokens (frames, height, width) of a generation."""
    frames = (generation.num_frames - 1) // model.vae_temporal + 1
    height, width = generation.height // model.vae_spatial, generation.width // model.vae_spatial
    return frames // model.patch[0], height // model.patch[1], width // model.patch[2]


def attention_share(model: ModelFacts, tokens: int) -> float:
    """Self-attention's share of the multiply-adds of a Wan block; modulation, norms and embeddings are left out."""
    dim = model.heads * model.head_dim
    attention = 4 * tokens**2 * dim
    projections = 2 * tokens * (4 * dim**2 + 2 * dim**2 + 2 * dim * model.ffn_dim)
    cross = 2 * model.text_tokens * 2 * dim**2 + 4 * tokens * model.text_tokens * dim
    return attention / (attention + projections + cross)


def speed_up(
    share: float, density: float, dense_share: float = 0.0, efficiency: float = EFFICIENCY, overhead: float = OVERHEAD
) -> float:
    """Amdahl's law for sparse attention: 1 / (1 - s (1 - w) (1 - rho / e - o)).

    Args:
        share: s, attention's share of the time.
        density: rho, share of pairs computed in sparse calls.
        dense_share: w, share of calls kept dense.
        efficiency: e, speed per pair relative to the dense baseline.
        overhead: o, ordering and selecting as a share of dense attention time.
    """
    return 1 / (1 - share * (1 - dense_share) * (1 - density / efficiency - overhead))


def estimate(preset: Preset) -> Estimate:
    """Predict density and gain of a preset, without loading a model."""
    grid = token_grid(preset.model, preset.generation)
    share = attention_share(preset.model, grid[0] * grid[1] * grid[2])
    kept = preset.schedule.dense_share(preset.generation.num_inference_steps, preset.model.layers)
    if preset.method.name == "dense":
        return Estimate(grid, share, 1.0, 1.0, 1.0)
    method = get_method(preset.method.name, **preset.method.parameters)
    density = _density(method, preset.schedule.head_table, TokenLayout(grid))
    gain = None if density is None else speed_up(share, density, kept)
    return Estimate(grid, share, density, kept, gain)


def _density(method: Method, table: HeadTable | None, layout: TokenLayout) -> float | None:
    """Density of the sparse calls, over all heads; None where it depends on queries and keys."""
    if table is None:
        if not method.is_static:
            return method.requested_density
        nothing = torch.empty(0)
        return method.select(nothing, nothing, CallContext(layout)).density
    total, known = 0.0, dict[Method, float | None]()
    for layer in range(table.layer_count):
        for group in table.groups(layer, method):
            if group.method is None:
                continue
            if group.method not in known:
                known[group.method] = _density(group.method, None, layout)
            density = known[group.method]
            if density is None:
                return None
            total += density * len(group.heads)
    return total / (table.layer_count * table.head_count)
