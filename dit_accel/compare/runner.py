"""Generate the same prompts and seeds with every candidate, interleaved, and measure each clip against dense."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from dit_accel.acceleration import accelerate
from dit_accel.bench.timing import clock_for
from dit_accel.compare.candidates import DENSE, Candidate
from dit_accel.generation import call_pipeline
from dit_accel.metrics import closeness, flicker
from dit_accel.presets import Generation

Judge = Callable[[np.ndarray], dict[str, bool]]
"""Says of a clip, uint8 `[T, H, W, 3]`, which criteria of its prompt it meets."""


@dataclass(frozen=True)
class Task:
    """A prompt, its seed, and what decides whether a clip follows it (None: nothing does)."""

    prompt: str
    seed: int
    judge: Judge | None = None


@dataclass
class Outcome:
    """One prompt with one candidate, over all rounds."""

    task: Task
    candidate: Candidate
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    clip: np.ndarray | None = None
    density: float = 1.0
    error_bound: float | None = None
    peak_mib: float | None = None

    def to_dict(self, reference: np.ndarray) -> dict[str, Any]:
        """One row: time, closeness to the dense clip `reference`, steadiness, and what the judge says."""
        assert self.clip is not None
        near = closeness(self.clip, reference)
        judged = {} if self.task.judge is None else self.task.judge(np.round(self.clip * 255).astype(np.uint8))
        return {
            "prompt": self.task.prompt,
            "seed": self.task.seed,
            "candidate": self.candidate.label,
            "method": self.candidate.method.name,
            "parameters": self.candidate.method.model_dump_json(exclude_unset=True),
            "schedule": self.candidate.schedule.model_dump_json(exclude_defaults=True, exclude={"head_table"}),
            "seconds": statistics.median(self.seconds),
            "ratio": statistics.median(self.ratios),
            "ratio_low": min(self.ratios),
            "ratio_high": max(self.ratios),
            "density": self.density,
            "psnr": near.psnr,
            "ssim": near.ssim,
            "lpips": near.lpips,
            "flicker": flicker(self.clip),
            "flicker_dense": flicker(reference),
            "error_bound": self.error_bound,
            "peak_mib": self.peak_mib,
            **judged,
        }


def run_task(
    pipe: Any,
    generation: Generation,
    task: Task,
    candidates: Sequence[Candidate],
    rounds: int,
    shift: int = 0,
    backend: str = "auto",
    inputs: dict[str, Any] | None = None,
) -> list[Outcome]:
    """Generate one prompt with every candidate, `rounds` times; the order shifts by one from round to round.

    Args:
        pipe: a Diffusers pipeline.
        generation: sizes and sampling, the same for all.
        task: prompt and seed.
        candidates: dense first.
        rounds: how often; ratios are taken within a round, clips from the first.
        shift: where the order of the first round begins.
        backend: backend of `block_attention`.
        inputs: further arguments of the pipeline, such as images. Default: none.
    """
    outcomes = [Outcome(task, candidate) for candidate in candidates]
    for number in range(rounds):
        for place in range(len(outcomes)):
            _generate(pipe, generation, outcomes[(place + number + shift) % len(outcomes)], backend, inputs)
        for outcome in outcomes:
            outcome.ratios.append(outcomes[0].seconds[-1] / outcome.seconds[-1])
    return outcomes


def _generate(
    pipe: Any, generation: Generation, outcome: Outcome, backend: str, inputs: dict[str, Any] | None = None
) -> None:
    candidate, cuda = outcome.candidate, torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    what: dict[str, Any] = {"method": candidate.method, "schedule": candidate.schedule}
    if candidate.preset is not None:
        what = {"preset": candidate.preset}
    with accelerate(pipe, **{**what, "backend": backend, **candidate.options}) as acceleration:
        task, clock = outcome.task, clock_for(torch.device("cuda" if cuda else "cpu"))
        clip, times = call_pipeline(pipe, generation, task.prompt, task.seed, inputs, clock=clock)
        report = acceleration.report()
    outcome.seconds.append(times["denoise"])
    if outcome.clip is None:
        outcome.clip, outcome.density = clip, report.density
        outcome.error_bound = None if report.worst_error is None else report.worst_error[1]
        outcome.peak_mib = torch.cuda.max_memory_allocated() / 2**20 if cuda else None


def run_all(
    pipe: Any,
    generation: Generation,
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    rounds: int = 1,
    backend: str = "auto",
    inputs: dict[str, Any] | None = None,
) -> Iterator[tuple[list[Outcome], list[dict[str, Any]]]]:
    """The outcomes and rows of one task after the other; each candidate first runs one step that does not count."""
    assert candidates[0].label == DENSE
    warm = generation.model_copy(update={"num_inference_steps": 1})
    for candidate in candidates:
        # The one step would run dense otherwise, and warm up nothing.
        sparse = candidate.schedule.model_copy(update={"dense_steps": (), "dense_noise": ()})
        preset = candidate.preset and candidate.preset.model_copy(update={"schedule": sparse})
        _generate(pipe, warm, Outcome(tasks[0], replace(candidate, schedule=sparse, preset=preset)), backend, inputs)
    for number, task in enumerate(tasks):
        outcomes = run_task(pipe, generation, task, candidates, rounds, number, backend, inputs)
        reference = outcomes[0].clip
        assert reference is not None
        yield outcomes, [outcome.to_dict(reference) for outcome in outcomes]
