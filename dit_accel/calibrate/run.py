"""Run the prompts dense, measure, resume, and solve."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.acceleration import accelerate
from dit_accel.calibrate.alone import run_alone
from dit_accel.calibrate.layers import LayerGroups, LayerObserver, solve_groups
from dit_accel.calibrate.observer import Observer
from dit_accel.calibrate.probe import probe
from dit_accel.calibrate.statistics import Statistics, layer_parts
from dit_accel.errors import ConfigError
from dit_accel.families.registry import family_of
from dit_accel.generation import call_pipeline
from dit_accel.head_densities import without_density
from dit_accel.methods.base import Method
from dit_accel.presets import Generation, Preset
from dit_accel.schedule import Schedule

DEFAULT_CANDIDATES = (
    "composed:order=raster,density=0.05,remainder=drop",
    "composed:density=0.1",
    "composed:density=0.2",
    "aurora:density=0.05",
    "aurora:density=0.1",
    "aurora:density=0.2",
    "aurora:density=0.35",
    "radial:decay=0.2,neighbor=0.5",
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
        ranges: ranges of steps that are measured and solved apart; those that are dense in all layers belong to none.
        parts: consecutive parts of the layers whose effect on the picture is probed, one generation for each part and
            range of steps of every prompt. Default 0: errors of all layers and steps count alike.
        alone: also run every candidate alone, for its time and what it does to the picture: a generation for each and
            prompt. Statistics without these runs serve a plan with them, which adds them. Default False.
        inputs: a hash of each file that the generations read besides their prompts, by its option. Default: none.
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
    ranges: int = 1
    parts: int = 0
    alone: bool = False
    inputs: Mapping[str, str] = field(default_factory=dict)

    def steps_of(self, at: int) -> range:
        """The steps of one of the ranges, of those that some schedule does not keep dense as equal as can be."""
        schedules = [s for s in (self.preset.schedule, self.preset.schedule_2) if s is not None]
        steps = [
            step
            for step in range(self.generation.num_inference_steps)
            if not all(any(start <= step < end for start, end in s.dense_steps) for s in schedules)
        ]
        first, last = (round(n * len(steps) / self.ranges) for n in (at, at + 1))
        return range(steps[first], steps[last - 1] + 1) if first < last else range(0)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first steps of the later ranges.

        Raises:
            ConfigError: there are more ranges than steps.
        """
        found = [self.steps_of(at) for at in range(self.ranges)]
        if self.ranges > 1 and not all(found):
            raise ConfigError("--step-ranges", f"expected no more than the steps that are not dense, got {self.ranges}")
        return tuple(steps.start for steps in found[1:])

    @property
    def kinds(self) -> tuple[int, ...]:
        """A number for each candidate, the same for those whose heads run in one call: all but density is alike."""
        left = [without_density(method) for method in self.candidates.values()]
        return tuple(left.index(each) for each in left)

    def plain_settings(self) -> dict[str, Any]:
        """Plain values that say whether statistics belong to this plan, as JSON gives them back."""
        settings: dict[str, Any] = json.loads(json.dumps(self.settings()))
        return settings

    def settings(self) -> dict[str, Any]:
        """Plain values that say whether statistics belong to this plan."""
        return {
            "preset": self.preset.name,
            "schedule": _timing(self.preset.schedule),
            "schedule_2": None if self.preset.schedule_2 is None else _timing(self.preset.schedule_2),
            "inputs": dict(self.inputs) or None,
            "candidates": {name: [m.name, m.model_dump(mode="json")] for name, m in self.candidates.items()},
            "prompts": list(self.prompts),
            "generation": self.generation.model_dump(mode="json"),
            "seed": self.seed,
            "share": self.share,
            "every": self.every,
            "layer_reuse": self.layer_reuse,
            "weights": self.weights,
            "ranges": self.ranges,
            "parts": self.parts,
        }

    def observer(self, schedule: Schedule, sums: Statistics, number: int) -> Observer:
        """What measures prompt `number` under a schedule, adding to `sums`."""
        methods = list(self.candidates.values())
        common = (schedule, sums, self.share, self.every, self.seed + number)
        if not self.layer_reuse:
            return Observer(methods, *common, self.starts)
        return LayerObserver(methods[0], self.layer_reuse, schedule.layer_heads, *common)


def _timing(schedule: Schedule) -> dict[str, Any]:
    """What of a schedule decides which calls are measured."""
    return schedule.model_dump(mode="json", exclude={"head_table", "max_error"})


def measure(
    pipe: Any, plan: Plan, path: Path, tell: Callable[[str], None], inputs: dict[str, Any] | None = None
) -> Statistics:
    """Generate every prompt dense and measure the candidates meanwhile; prompts that `path` holds are not run again.

    The file is written after each prompt and each probe; a run that is killed loses what is under way and nothing else.
    Two transformers of one pipeline are pooled: a head table serves both.

    Args:
        pipe: the pipeline, unaccelerated.
        plan: what to measure.
        path: file of the statistics.
        tell: called with one line before each prompt and at the end.
        inputs: further arguments of the pipeline, such as images. Default: none.

    Raises:
        ConfigError: `path` holds statistics of another plan.
    """
    settings, clips = plan.plain_settings(), dict[int, np.ndarray]()
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
            clips[number], _ = call_pipeline(pipe, plan.generation, prompt, plan.seed + number, inputs)
        sums.done.append(number)
        sums.seconds += time.perf_counter() - begun
        sums.save(path, settings)
        held = sums
    if held is None:
        raise ValueError("calibration needs at least one prompt")
    held = probe(pipe, plan, held, path, tell, inputs, clips)
    held = run_alone(pipe, plan, held, path, tell, inputs) if plan.alone else held
    tell(f"measured {len(held.done)} prompts in {held.seconds:.0f} s; statistics: {path}")
    return held


def _empty(pipe: Any, plan: Plan) -> Statistics:
    """Empty sums of the size of the model."""
    layers = family_of(pipe.transformer).layers(pipe.transformer)
    if plan.layer_reuse:
        return Statistics.empty(len(layers), 1, plan.layer_reuse + 1)
    parts = len(layer_parts(len(layers), plan.parts))
    sizes = (len(layers), layers[0].module.heads, len(plan.candidates), plan.ranges, parts, len(plan.prompts))
    return Statistics.empty(*sizes, kinds=plan.kinds)


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
    check_seen(held)
    return solve_groups(held.mean_error()[0, :, 0], (held.calls[0] > 0).tolist(), max_error)


def check_seen(held: Statistics) -> None:
    """Refuse statistics of no call.

    Raises:
        ConfigError: the schedule kept every call dense.
    """
    if not bool((held.calls > 0).any()):
        raise ConfigError("schedule", "nothing was measured: it keeps every layer or step dense; ask for more steps")
