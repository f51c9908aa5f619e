"""Token counts and the gain that Amdahl's law allows, from a preset alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from dit_accel.flow_shift import noise_levels
from dit_accel.head_table import HeadTable
from dit_accel.layer_methods import method_of_layer
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.presets.schema import Generation, ModelFacts, Preset
from dit_accel.state import CallContext

Part = tuple[float | None, float]
"""Density of a share of the attention (None: only a run can tell), and that share."""


@dataclass(frozen=True)
class Machine:
    """What is assumed of the machine that runs the attention.

    Args:
        name: how to speak of it.
        efficiency: speed of sparse block attention per computed pair, relative to the dense baseline.
        overhead: time that does not depend on the density (ordering, selecting), as a share of dense attention time.
        source: where the two numbers come from.
    """

    name: str
    efficiency: float
    overhead: float
    source: str


GPU = Machine("GPU", 0.7, 0.03, "assumed, for a GPU with a good dense baseline")
CPU = Machine(
    "CPU",
    0.66,
    0.14,
    "fitted to calls as presets with `composed` make them, 4096 to 32760 tokens, whose gains are within a fifth of the "
    "fit: docs/results/attention-amd-epyc.csv",
)


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


def block_parameters(model: ModelFacts) -> int:
    """Weights of attention and feed-forward layers in all blocks, of both experts where there are two.

    Nearly all of a model with cross-attention; a joint-attention model that has weights of its own for text holds up to
    twice as many.
    """
    dim = model.heads * model.head_dim
    block = 4 * dim**2 * (2 if model.text == "cross" else 1) + 2 * dim * model.ffn_dim
    return model.layers * block * (1 if model.boundary is None else 2)


def saving(density: float, machine: Machine = GPU) -> float:
    """Share of its dense time that a sparse call saves: 1 - rho / e - o; 0 where that is a loss, since it runs dense.

    Args:
        density: rho, share of pairs computed.
        machine: e and o, its efficiency and overhead.
    """
    return max(0.0, 1 - density / machine.efficiency - machine.overhead)


def speed_up(share: float, saved: float) -> float:
    """Amdahl's law: 1 / (1 - s x) for attention's share s of the time, of which x is saved."""
    return 1 / (1 - share * saved)


def estimate(preset: Preset, machine: Machine = GPU) -> Estimate:
    """Predict density and gain of a preset, without loading a model; overrides and head tables are counted."""
    layout = token_layout(preset.model, preset.generation)
    share = attention_share(preset.model, layout.tokens)
    parts = list(_sparse_parts(preset, layout))
    known = [(density, weight) for density, weight in parts if density is not None]
    if not parts:
        return Estimate(layout.grid, layout.text, share, 1.0, 1.0, 1.0, machine)
    sparse = sum(weight for _, weight in parts)
    if len(known) < len(parts):
        return Estimate(layout.grid, layout.text, share, None, 1 - sparse, None, machine)
    density = sum(density * weight for density, weight in known) / sparse
    saved = sum(saving(density, machine) * weight for density, weight in known)
    return Estimate(layout.grid, layout.text, share, density, 1 - sparse, speed_up(share, saved), machine)


def _sparse_parts(preset: Preset, layout: TokenLayout) -> Iterator[Part]:
    """What the schedules leave to methods: every (step, layer) that is not dense, by groups of heads."""
    method = get_method(preset.method.name, **preset.method.parameters)
    facts, steps = preset.model, preset.generation.num_inference_steps
    found: dict[tuple[bool, int, int], list[Part]] = {}
    for step, noise in enumerate(noise_levels(steps, facts.flow_shift)):
        second = preset.schedule_2 if facts.boundary is not None and noise < facts.boundary else None
        schedule = preset.schedule if second is None else second
        table = schedule.head_table
        layers, phase = (facts.layers, 0) if table is None else (table.layer_count, table.phase(step))
        for layer in range(layers):
            if schedule.dense_reason(layer, step, noise, layout.tokens) is None:
                place = (second is None, layer, phase)
                if place not in found:
                    found[place] = list(
                        _layer_parts(method_of_layer(method, schedule, layer), table, layer, step, layout)
                    )
                yield from ((density, weight / (steps * layers)) for density, weight in found[place])


def _layer_parts(method: Method, table: HeadTable | None, layer: int, step: int, layout: TokenLayout) -> Iterator[Part]:
    """Density of each group of heads of a layer that does not run dense as a whole, and the group's share of them."""
    if table is None:
        if method.name != "dense":
            yield _density(method, layout), 1.0
        return
    for group in table.groups(layer, method, step):
        density = 0.0 if group.method is None else _density(group.method, layout)
        yield density, len(group.heads) / table.head_count


def _density(method: Method, layout: TokenLayout) -> float | None:
    """Density of a method, with what it computes after the kernel; None where it depends on queries and keys."""
    extra, requested, text = method.extra_density(layout), method.requested_density, layout.text / layout.tokens
    if method.is_static:
        return _static_density(method, layout) + extra
    return None if requested is None else text + (1 - text) * requested + extra  # rows of text attend to everything


@lru_cache(maxsize=256)
def _static_density(method: Method, layout: TokenLayout) -> float:
    nothing = torch.empty(0)
    return method.select(nothing, nothing, CallContext(layout)).density
