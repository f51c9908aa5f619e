"""Everything that `docs/results` says about speed, in one go: what is measured on which kind of machine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dit_accel.bench.attention import measure, variants
from dit_accel.bench.kernels import VARIANTS, measure_kernels
from dit_accel.bench.options import TIME_IS_UP, Options
from dit_accel.bench.random_blocks import RandomBlocks
from dit_accel.bench.shapes import MODEL_SHAPES, find_shape
from dit_accel.bench.step import build, left_out, measure_step
from dit_accel.errors import DitAccelError
from dit_accel.methods.registry import list_methods
from dit_accel.presets import load_preset

_ALL = tuple(name for name in list_methods() if name != "dense")
_FEW = ("aurora", "composed", "radial", "sliding_tile")


@dataclass(frozen=True)
class Sweep:
    """Methods over shapes and densities; `heads` None: all, or as many as the time limit of a call allows."""

    shapes: tuple[str, ...]
    methods: tuple[str, ...]
    densities: tuple[float, ...]
    heads: int | None = None


@dataclass(frozen=True)
class Suite:
    """What is measured on one kind of machine.

    Args:
        attention: single calls of methods, one sweep after the other.
        kernels: block attention alone, with every variant.
        steps: presets whose whole transformer runs, each with its number of blocks (None: as many as fit).
        step_methods, step_density: what runs in them.
        limit: longest dense call in seconds; heads are left out to keep to it.
        rounds: interleaved rounds.
    """

    attention: tuple[Sweep, ...]
    kernels: Sweep
    steps: tuple[tuple[str, int | None], ...]
    step_methods: tuple[str, ...] = _FEW
    step_density: float = 0.25
    limit: float = 4.0
    rounds: int = 3


CPU = Suite(
    attention=(
        Sweep(("cpu-4k",), (RandomBlocks.name, *_FEW), (0.125, 0.25, 0.5, 0.75)),
        Sweep(("cpu-1k",), _ALL, (0.25,), heads=4),
        Sweep(tuple(MODEL_SHAPES), (RandomBlocks.name, *_FEW), (0.25,), heads=2),
    ),
    kernels=Sweep(("cpu-1k", "cpu-4k", "flux-1k"), tuple(VARIANTS), (0.125, 0.25, 0.5, 1.0), heads=2),
    steps=(("tiny-wan", None), ("flux1-dev", 1)),
)
"""Made to fit into eight minutes on two cores."""

CUDA = Suite(
    attention=(
        Sweep(tuple(MODEL_SHAPES), _ALL, (0.125, 0.25)),
        Sweep(("wan-1.3b", "hunyuan", "flux-2k"), (RandomBlocks.name, *_FEW), (0.05, 0.5, 0.75)),
    ),
    kernels=Sweep(tuple(MODEL_SHAPES), tuple(VARIANTS), (0.05, 0.125, 0.25, 0.5, 1.0)),
    steps=tuple(
        (name, None)
        for name in (
            "wan2.1-t2v-1.3b-480p",
            "wan2.1-t2v-14b-720p",
            "hunyuan-video-t2v-720p",
            "flux1-dev",
            "flux1-dev-2k",
            "flux1-dev-4k",
            "cogvideox-5b",
        )
    ),
    rounds=5,
)


def suite_for(device: str) -> Suite:
    """The suite of a kind of device, "cpu" or "cuda"."""
    return CUDA if device.startswith("cuda") else CPU


def attention_rows(sweeps: Sequence[Sweep], options: Options) -> Iterator[dict[str, Any]]:
    """Rows of `bench attention` of all sweeps."""
    for sweep in sweeps:
        for name in sweep.shapes:
            cases = variants(sweep.methods, sweep.densities)
            yield from (row.to_dict() for row in measure(find_shape(name), cases, replace(options, heads=sweep.heads)))


def kernel_rows(sweep: Sweep, options: Options) -> Iterator[dict[str, Any]]:
    """Rows of `bench kernels`."""
    for name in sweep.shapes:
        made = replace(options, heads=sweep.heads)
        yield from map(vars, measure_kernels(find_shape(name), sweep.densities, sweep.methods, made))


def step_rows(suite: Suite, options: Options) -> Iterator[dict[str, Any]]:
    """Rows of `bench step` of all presets; one that does not fit, or would begin too late, is left out with a line."""
    cases = variants(suite.step_methods, (suite.step_density,))
    for name, layers in suite.steps:
        preset = load_preset(name)
        if options.is_over:
            yield left_out(name, TIME_IS_UP)
            continue
        try:
            built = build(preset, layers, options.device, options.dtype, options.seed)
        except (DitAccelError, RuntimeError) as failure:
            yield left_out(name, str(failure).splitlines()[0])
            continue
        yield from measure_step(preset, built, cases, suite.rounds, options.backend)


def machine_name(device: str) -> str:
    """A device as it stands in the names of files: "amd-epyc-9v74"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "unknown"
