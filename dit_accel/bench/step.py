"""One denoising step of a whole transformer with random weights, dense and accelerated in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.acceleration import accelerate
from dit_accel.bench.options import Options
from dit_accel.bench.random_models import (
    Blueprint,
    blueprint_of,
    make_model,
    parameters_of,
    step_arguments,
    total_layers,
)
from dit_accel.bench.shapes import Shape
from dit_accel.bench.timing import Spread, available_bytes, interleaved, ratios, seconds
from dit_accel.bench.verify import verify
from dit_accel.errors import DitAccelError, UnsupportedError
from dit_accel.estimate import token_layout
from dit_accel.handle import Acceleration
from dit_accel.kernels.dense import preferred
from dit_accel.methods.base import Method
from dit_accel.presets import Preset

_CALL = ("model", "layers", "model_layers", "tokens", "dtype", "method", "parameters")
_FIGURES = ("density", "dense_backend", "dense_s", "method_s", "ratio", "ratio_low", "ratio_high", "verified_error")
_EMPTY: dict[str, Any] = {**dict.fromkeys(_FIGURES), "note": ""}
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

    Dense is what the dense steps of a schedule run: the fastest dense kernel known for the device. A method is first
    verified on a small call with the model's head size and dtype; one that is wrong, or fails, gets a note and no time.

    Args:
        preset: names the model in the rows. Its schedule has no say: every layer runs the method at every density.
        built: what `build` made.
        methods: what to compare with dense. Where costs differ from step to step, the mean of the steps counts after
            which they repeat.
        rounds: interleaved rounds, after one of each that does not count.
        backend: backend of `block_attention`.
    """
    weight = next(built.model.parameters())
    sizes, layout = preset.model, token_layout(preset.model, preset.generation)
    shape = Shape(preset.name, layout, sizes.heads, sizes.head_dim, preset.description)
    options = Options(weight.device, weight.dtype, rounds, backend=backend)
    common = {
        "model": preset.name,
        "layers": built.layers,
        "model_layers": built.published_layers,
        "tokens": layout.video,
        "dtype": str(weight.dtype)[6:],
    }
    for method in methods:
        row = {**common, "method": method.name, "parameters": method.model_dump_json(exclude_unset=True), **_EMPTY}
        try:
            row["verified_error"] = verify(method, shape, options)
            row |= _compared(built, method, shape, options)
        except (DitAccelError, RuntimeError) as failure:
            row["note"] = str(failure).splitlines()[0]
        yield row


def left_out(model: str, note: str) -> dict[str, Any]:
    """The row of a model of which nothing was measured, and why."""
    return {**dict.fromkeys(_CALL), **_EMPTY, "model": model, "note": note}


def _compared(built: StepModel, method: Method, shape: Shape, options: Options) -> dict[str, Any]:
    """Dense and the method in interleaved rounds, after one of each that does not count."""
    model, device, seen = built.model, options.device, list[float]()
    # Too short a sequence is what makes a schedule run everything dense.
    short = partial(accelerate, model, method=method, min_tokens=shape.layout.tokens + 1)
    dense = partial(_forward, built, short, device, 1, [])
    sparse = partial(accelerate, model, method=method, backend=options.backend, break_even=1.0)
    fast = partial(_forward, built, sparse, device, method.cycle, seen)
    dense(), fast()
    base, other = interleaved([dense, fast], options.rounds)
    ratio = ratios(base, other)
    queries = torch.empty(1, 1, shape.layout.tokens, shape.head_dim, device=device, dtype=options.dtype)
    return {
        "density": seen[-1],
        "dense_backend": preferred(queries),
        "dense_s": Spread.of(base).median,
        "method_s": Spread.of(other).median,
        "ratio": ratio.median,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }


@torch.no_grad()
def _forward(
    built: StepModel, switch: Callable[[], Acceleration], device: torch.device, steps: int, densities: list[float]
) -> float:
    """Seconds of a forward pass under `switch()`, in the mean of a run's first `steps`; their density is appended."""
    level, taken = built.arguments["timestep"], list[float]()
    with switch() as acceleration:
        for step in range(steps):
            # A falling noise level is what tells one step from the next.
            arguments = built.arguments | {"timestep": level * (1 - 0.5 * step / steps)}
            taken.append(seconds(partial(built.model, **arguments), device))
        densities.append(acceleration.report().density)
    return fmean(taken)
