"""Run the prompts dense, measure, resume, and solve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dit_accel.acceleration import accelerate
from dit_accel.calibrate.layers import LayerGroups, LayerObserver, solve_groups
from dit_accel.calibrate.observer import Observer
from dit_accel.calibrate.solve import Assignment, solve
from dit_accel.calibrate.statistics import Statistics
from dit_accel.errors import ConfigError
from dit_accel.families.registry import family_of
from dit_accel.generation import call_pipeline
from dit_accel.methods.base import Method
from dit_accel.presets import Generation, Preset
from dit_accel.schedule import Schedule

DEFAULT_CANDIDATES = (
    "composed:density=0.1",
    "composed:density=0.2",
    "composed:density=0.35",
    "composed:density=0.5",
    "radial:decay=0.2,neighbor=0.5",
    "radial",
    "sliding_tile",
    "neighborhood:density=0.2",
    "dense",
)


@dataclass(frozen=True)
class Plan:
    """What a calibration measures; statistics of another plan are not mixed with its own.

    Args:
        preset: model, sizes and the schedule whose dense steps are left out.
        candidates: the methods, by the words they were asked for with.
        prompts: what to generate; prompt i runs with seed + i.
        generation: sizes and sampling.
        seed: of the first prompt, and of the blocks drawn.
        share: share of the query blocks that is computed per candidate and call.
        every: only every n-th step is measured.
        layer_reuse: instead of candidates per head, how many layers back the plan of the one candidate is tried.
            Default 0: candidates per head.
        weights: which weights were measured; see `fingerprint`. Default "": not said.
    """

    preset: Preset
    candidates: dict[str, Method]
    prompts: tuple[str, ...]
    generation: Generation
    seed: int = 0
    share: float = 0.25
    every: int = 1
    layer_reuse: int = 0
    weights: str = ""

    def settings(self) -> dict[str, Any]:
        """Plain values that say whether statistics belong to this plan."""
        return {
            "preset": self.preset.name,
            "schedule": self.preset.schedule.model_dump(mode="json", exclude={"head_table", "max_error"}),
            "candidates": {name: [m.name, m.model_dump(mode="json")] for name, m in self.candidates.items()},
            "prompts": list(self.prompts),
            "generation": self.generation.model_dump(mode="json"),
            "seed": self.seed,
            "share": self.share,
            "every": self.every,
            "layer_reuse": self.layer_reuse,
            "weights": self.weights,
        }

    def observer(self, schedule: Schedule, sums: Statistics, number: int) -> Observer:
        """What measures prompt `number` under a schedule, adding to `sums`."""
        methods = list(self.candidates.values())
        common = (schedule, sums, self.share, self.every, self.seed + number)
        if not self.layer_reuse:
            return Observer(methods, *common)
        return LayerObserver(methods[0], self.layer_reuse, schedule.layer_heads, *common)


def measure(
    pipe: Any, plan: Plan, path: Path, tell: Callable[[str], None], inputs: dict[str, Any] | None = None
) -> Statistics:
    """Generate every prompt dense and measure the candidates meanwhile; prompts that `path` holds are not run again.

    The file is written after each prompt; a run that is killed loses the prompt under way and nothing else. Two
    transformers of one pipeline are pooled: a head table serves both.

    Args:
        pipe: the pipeline, unaccelerated.
        plan: what to measure.
        path: file of the statistics.
        tell: called with one line before each prompt and at the end.
        inputs: further arguments of the pipeline, such as images. Default: none.

    Raises:
        ConfigError: `path` holds statistics of another plan.
    """
    settings = json.loads(json.dumps(plan.settings()))
    held = Statistics.load(path, settings) if path.exists() else None
    for number, prompt in enumerate(plan.prompts):
        if held is not None and number in held.done:
            continue
        begun = time.perf_counter()
        tell(_progress(number, prompt, plan, held))
        sums = _empty(pipe, plan) if held is None else held.copy()
        with accelerate(pipe, method="dense") as acceleration:
            for name, engine in acceleration.engines.items():
                second = plan.preset.schedule_2 if name == "transformer_2" else None
                engine.observer = plan.observer(second or plan.preset.schedule, sums, number)
            call_pipeline(pipe, plan.generation, prompt, plan.seed + number, inputs)
        sums.done.append(number)
        sums.seconds += time.perf_counter() - begun
        sums.save(path, settings)
        held = sums
    if held is None:
        raise ValueError("calibration needs at least one prompt")
    tell(f"measured {len(held.done)} prompts in {held.seconds:.0f} s; statistics: {path}")
    return held


def _empty(pipe: Any, plan: Plan) -> Statistics:
    """Empty sums of the size of the model."""
    layers = family_of(pipe.transformer).layers(pipe.transformer)
    if plan.layer_reuse:
        return Statistics.empty(len(layers), 1, plan.layer_reuse + 1)
    return Statistics.empty(len(layers), layers[0].module.heads, len(plan.candidates))


def _progress(number: int, prompt: str, plan: Plan, held: Statistics | None) -> str:
    done = 0 if held is None else len(held.done)
    line = f"prompt {number + 1} of {len(plan.prompts)}: {prompt}"
    if held is None or not done:
        return line
    left = held.seconds / done * (len(plan.prompts) - done)
    return f"{line} (about {left / 60:.1f} min left)" if left >= 60 else f"{line} (about {left:.0f} s left)"


def group_layers(held: Statistics, max_error: float) -> LayerGroups:
    """Solve for the layers that were seen; the others stand alone.

    Args:
        held: what was measured with `layer_reuse`.
        max_error: the budget; see `solve_groups`.

    Raises:
        ConfigError: nothing was measured; or see `solve_groups`.
    """
    _check_seen(held)
    return solve_groups(held.mean_error()[:, 0], (held.calls > 0).tolist(), max_error)


def _check_seen(held: Statistics) -> None:
    if not bool((held.calls > 0).any()):
        raise ConfigError("schedule", "nothing was measured: it keeps every layer or step dense; ask for more steps")


def assign(
    held: Statistics, max_error: float | None = None, max_density: float | None = None, max_time: float | None = None
) -> Assignment:
    """Solve for the layers that were seen; layers that always run dense take the first candidate, which never runs.

    Args:
        held: what was measured.
        max_error, max_density, max_time: the budget, one of them; see `solve`. Time is that of attention as a share of
            dense attention's.

    Raises:
        ConfigError: nothing was measured, because the schedule keeps every call dense; or see `solve`.
    """
    _check_seen(held)
    seen = held.calls > 0
    error, density, time = held.mean_error()[seen], held.mean_density()[seen], held.mean_time()[seen]
    if max_time is None:
        found = solve(error, density, max_error=max_error, max_cost=max_density)
    elif max_error is None and max_density is None:
        found = solve(error, time, max_cost=max_time, option="--max-time")
    else:
        raise ConfigError("budget", "expected one of error, density and time, got several")
    taken = found.choice.unsqueeze(-1)
    predicted = float(time.gather(-1, taken).mean()) if bool((held.timings[seen] > 0).all()) else None
    choice = torch.zeros(held.error.shape[:2], dtype=torch.int64)
    choice[seen] = found.choice
    return replace(found, choice=choice, cost=float(density.gather(-1, taken).mean()), time=predicted)
