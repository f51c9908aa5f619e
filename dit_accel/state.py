"""What is known about the forward pass under way: step, noise level, guidance branch and geometry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from dit_accel.layout import TokenLayout


@dataclass(frozen=True)
class RunState:
    """One forward pass of a transformer, as read from its own arguments and Diffusers' cache context.

    Args:
        grid: (frames, height, width) in tokens.
        step: denoising step, counted from 0 in the whole run.
        steps: number of steps of the run, when the pipeline says it.
        noise: noise level in [0, 1] (1 = pure noise): timestep / training timesteps, or the scheduler's sigma.
        branch: guidance branch, as named by the pipeline's `cache_context` ("cond", "uncond"), else "default".
        generation: how many generations this transformer has begun since it was accelerated.
        batch: rows in the batch of this pass.
        text_valid: valid text tokens per batch item, where the model pads its text. None: all.
        prefix_frames: leading frames of the grid that are conditioning and not denoised.
    """

    grid: tuple[int, int, int]
    step: int
    noise: float
    branch: str = "default"
    steps: int | None = None
    generation: int = 0
    batch: int = 1
    text_valid: tuple[int, ...] | None = None
    prefix_frames: int = 0

    @property
    def branches_in_batch(self) -> int:
        """How many guidance branches stand one after the other in the batch, as the pipeline names it. Else 1."""
        return 2 if self.branch == "cond_uncond" and self.batch % 2 == 0 else 1


@dataclass
class CallContext:
    """Everything a method may know about one attention call besides q, k and v.

    Args:
        layout: token geometry of the sequence.
        layer: index of the attention layer in the transformer, in execution order.
        step: denoising step.
        noise: noise level in [0, 1].
        branch: guidance branch.
        memory: what this method kept for this (layer, branch); emptied when a generation starts.
        shared: the same for all layers of this branch; emptied when a generation starts.
        branches: the same for all guidance branches of this layer; emptied when a generation starts.
        seed: seed for methods that draw random numbers (routing noise, sampled rows).
        scratch: what `order` leaves for `select` of the same call.
        measures: what the method wants in the report of this call: numbers, or 0-d tensors that are read later.
    """

    layout: TokenLayout
    layer: int = 0
    step: int = 0
    noise: float = 1.0
    branch: str = "default"
    memory: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    values: Tensor | None = None
    extra_density: float = 0.0
    measures: dict[str, Any] = field(default_factory=dict)
    branches: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)
