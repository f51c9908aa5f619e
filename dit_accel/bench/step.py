"""One denoising step of a whole transformer with random weights, dense and accelerated in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.acceleration import accelerate
from dit_accel.bench.random_models import (
    Blueprint,
    blueprint_of,
    make_model,
    parameters_of,
    step_arguments,
    total_layers,
)
from dit_accel.bench.timing import Spread, available_bytes, interleaved, ratios, seconds
from dit_accel.errors import UnsupportedError
from dit_accel.estimate import token_grid
from dit_accel.handle import Acceleration
from dit_accel.methods.base import Method
from dit_accel.presets import Preset

_WEIGHTS_SHARE = 0.6  # of the free memory; the rest is for activations


@dataclass(frozen=True)
class StepModel:
    """A transformer with random weights and the arguments of one forward pass.

    Args:
        model: the transformer.
        arguments: of `model.forward`, for one guidance branch.
        layers: blocks that it has.
        published_layers: blocks of the published model.
    """

    model: nn.Module
    arguments: dict[str, Any]
    layers: int
    published_layers: int


def build(preset: Preset, layers: int | None, device: torch.device, dtype: torch.dtype, seed: int = 0) -> StepModel:
    """Make the transformer of a preset with random weights, with as many blocks as fit into memory.

    Args:
        preset: gives the sizes and the shape of the latents.
        layers: blocks to make. Default None: those of the model, or as many as fit.
        device, dtype: of weights and arguments.
        seed: of weights and arguments.

    Raises:
        ConfigError: the config of the preset's model is not known here.
        UnsupportedError: not even one block fits.
    """
    blueprint = blueprint_of(preset)
    fits = _layers_that_fit(blueprint, device, dtype)
    count = min(layers or total_layers(blueprint), fits)
    if count < 1:
        raise UnsupportedError(f"bench step: one block of {preset.name} does not fit into the free memory of {device}")
    torch.manual_seed(seed)
    with torch.device(device):
        model = make_model(blueprint, count).eval()
    if dtype != torch.float32:
        model = model.to(dtype)
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    return StepModel(model, step_arguments(blueprint, preset, draw), count, total_layers(blueprint))


def _layers_that_fit(blueprint: Blueprint, device: torch.device, dtype: torch.dtype) -> int:
    """From the sizes of a model without data."""
    free, total = available_bytes(device), total_layers(blueprint)
    if free is None or total < 2:
        return total
    with torch.device("meta"):
        one, whole = (parameters_of(make_model(blueprint, count)) for count in (1, total))
    block = (whole - one) / (total - 1)
    # Random weights are drawn in fp32 before they are cast, so that is what must fit.
    room = _WEIGHTS_SHARE * free / max(torch.float32.itemsize, dtype.itemsize)
    return int((room - (one - block)) // block)


def measure_step(
    preset: Preset, built: StepModel, methods: Sequence[Method], rounds: int, backend: str = "auto"
) -> Iterator[dict[str, Any]]:
    """Time a forward pass dense and with each method, in interleaved rounds; one row per method.

    Args:
        preset: names the model in the rows. Its schedule has no say: every layer runs the method at every density.
        built: what `build` made.
        methods: what to compare with dense.
        rounds: interleaved rounds, after one of each that does not count.
        backend: backend of `block_attention`.
    """
    model, device = built.model, next(built.model.parameters()).device
    for method in methods:
        common = {
            "model": preset.name,
            "layers": built.layers,
            "model_layers": built.published_layers,
            "tokens": int(torch.tensor(token_grid(preset.model, preset.generation)).prod()),
            "dtype": str(next(model.parameters()).dtype)[6:],
            "method": method.name,
            "parameters": method.model_dump_json(exclude_unset=True),
        }
        dense = partial(_forward, built, lambda: accelerate(model, method="dense"), device, [])
        seen: list[float] = []
        fast = partial(
            _forward,
            built,
            partial(accelerate, model, method=method, backend=backend, break_even=1.0),
            device,
            seen,
        )
        dense(), fast()
        base, other = interleaved([dense, fast], rounds)
        ratio = ratios(base, other)
        yield {
            **common,
            "density": seen[-1],
            "dense_s": Spread.of(base).median,
            "method_s": Spread.of(other).median,
            "ratio": ratio.median,
            "ratio_low": ratio.low,
            "ratio_high": ratio.high,
        }


@torch.no_grad()
def _forward(
    built: StepModel, switch: Callable[[], Acceleration], device: torch.device, densities: list[float]
) -> float:
    """Seconds of one forward pass under `switch()`; its density is appended to `densities`."""
    with switch() as acceleration:
        taken = seconds(partial(built.model, **built.arguments), device)
        densities.append(acceleration.report().density)
    return taken
