"""Token counts and the gain that Amdahl's law allows, from a preset alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch

from dit_accel.head_table import HeadTable
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.presets.schema import Generation, ModelFacts, Preset
from dit_accel.state import CallContext


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machine that runs the attention.

    Args:
        name: how to speak of it.
        efficiency: speed of sparse block attention per computed pair, relative to the dense baseline.
        overhead: time of ordering and selecting, as a share of dense attention time.
        source: where the two numbers come from.
    """

    name: str
    efficiency: float
    overhead: float
    source: str


GPU = Machine("GPU", 0.7, 0.03, "assumed, for a GPU with a good dense baseline")
CPU = Machine("CPU", 0.81, 0.02, "fitted to the measurements in docs/results/cpu_attention.md at 8192 tokens")


def machine_here(device: str = "auto") -> Machine:
    """The assumptions for `device`: "cpu", an accelerator, or "auto" (CUDA where there is one)."""
    is_cpu = device == "cpu" or (device == "auto" and not torch.cuda.is_available())
    return CPU if is_cpu else GPU


@dataclass(frozen=True)
class Estimate:
    """What a preset can gain.

    Args:
        grid: (frames, height, width) in tokens; a reference image counts as a frame.
        text: text tokens in the same sequence.
        attention_share: share of the transformer's operations that is self-attention, when dense.
        density: expected density of the sparse calls; None where only a run can tell.
        dense_share: share of the calls that the schedule makes dense.
        gain: predicted speed-up of the denoising loop; None where the density is not known.
        machine: what was assumed.
    """

    grid: tuple[int, int, int]
    text: int
    attention_share: float
    density: float | None
    dense_share: float
    gain: float | None
    machine: Machine

    @property
    def tokens(self) -> int:
        """Tokens of the video or image."""
        return self.grid[0] * self.grid[1] * self.grid[2]


def token_grid(model: ModelFacts, generation: Generation) -> tuple[int, int, int]:
    """Grid of video tokens (frames, height, width) of a generation; latent frames are filled up to whole tokens."""
    frames = (generation.num_frames - 1) // model.vae_temporal + 1
    height, width = generation.height // model.vae_spatial, generation.width // model.vae_spatial
    return -(-frames // model.patch[0]) + model.references, height // model.patch[1], width // model.patch[2]


def token_layout(model: ModelFacts, generation: Generation) -> TokenLayout:
    """The sequence of a generation: grid and text."""
    grid = token_grid(model, generation)
    return TokenLayout(grid) if model.text == "cross" else TokenLayout(grid, model.text_tokens, model.text)


def attention_share(model: ModelFacts, tokens: int) -> float:
    """Self-attention's share of a block's multiply-adds; modulation, norms and embeddings are left out.

    Args:
        model: facts of the transformer.
        tokens: length of the sequence, with its text where that stands in it.
    """
    dim = model.heads * model.head_dim
    attention = 4 * tokens**2 * dim
    linear = 2 * tokens * (4 * dim**2 + 2 * dim * model.ffn_dim)
    if model.text == "cross":
        linear += 2 * tokens * 2 * dim**2 + 2 * model.text_tokens * 2 * dim**2 + 4 * tokens * model.text_tokens * dim
    return attention / (attention + linear)


def speed_up(share: float, density: float, dense_share: float = 0.0, machine: Machine = GPU) -> float:
    """Amdahl's law for sparse attention: 1 / (1 - s (1 - w) (1 - rho / e - o)).

    Args:
        share: s, attention's share of the time.
        density: rho, share of pairs computed in sparse calls.
        dense_share: w, share of calls kept dense.
        machine: e and o, its efficiency and overhead.
    """
    saved = 1 - density / machine.efficiency - machine.overhead
    return 1 / (1 - share * (1 - dense_share) * saved)


def noise_levels(steps: int, flow_shift: float) -> list[float]:
    """Noise level at the start of every step of a schedule whose levels are shifted by `flow_shift`."""
    even = [1 - step / steps for step in range(steps)]
    return [flow_shift * level / (1 + (flow_shift - 1) * level) for level in even]


def dense_share(preset: Preset, tokens: int) -> float:
    """Share of the (step, layer) calls that the schedules keep dense, noise windows and both experts included."""
    steps, facts, dense = preset.generation.num_inference_steps, preset.model, 0
    for step, noise in enumerate(noise_levels(steps, facts.flow_shift)):
        is_second = facts.boundary is not None and noise < facts.boundary
        schedule = preset.schedule_2 if is_second and preset.schedule_2 is not None else preset.schedule
        dense += sum(schedule.dense_reason(n, step, noise, tokens) is not None for n in range(facts.layers))
    return dense / (steps * facts.layers)


def estimate(preset: Preset, machine: Machine = GPU) -> Estimate:
    """Predict density and gain of a preset, without loading a model."""
    layout = token_layout(preset.model, preset.generation)
    share = attention_share(preset.model, layout.tokens)
    table = preset.schedule.head_table
    if preset.method.name == "dense" and table is None:
        return Estimate(layout.grid, layout.text, share, 1.0, 1.0, 1.0, machine)
    method = get_method(preset.method.name, **preset.method.parameters)
    density = _density(method, table, layout, _sparse_steps(preset))
    kept = dense_share(preset, layout.tokens)
    gain = None if density is None else speed_up(share, density, kept, machine)
    return Estimate(layout.grid, layout.text, share, density, kept, gain, machine)


def _sparse_steps(preset: Preset) -> list[int]:
    """The steps that are not dense in all layers; all of them where none is left."""
    steps = range(preset.generation.num_inference_steps)
    dense = preset.schedule.dense_steps
    return [step for step in steps if not any(start <= step < end for start, end in dense)] or list(steps)


def _density(method: Method, table: HeadTable | None, layout: TokenLayout, steps: Sequence[int] = (0,)) -> float | None:
    """Density of the sparse calls, over all heads and `steps`; None where it depends on queries and keys."""
    if table is None:
        return _static_density(method, layout) if method.is_static else method.requested_density
    total, known = 0.0, dict[Method, float | None]()
    for step, layer in product(steps, range(table.layer_count)):
        for group in table.groups(layer, method, step):
            if group.method is None:
                continue
            if group.method not in known:
                known[group.method] = _density(group.method, None, layout)
            density = known[group.method]
            if density is None:
                return None
            total += density * len(group.heads)
    return total / (len(steps) * table.layer_count * table.head_count)


@lru_cache(maxsize=256)
def _static_density(method: Method, layout: TokenLayout) -> float:
    nothing = torch.empty(0)
    return method.select(nothing, nothing, CallContext(layout)).density
