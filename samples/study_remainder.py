"""What becomes of unselected blocks, studied: `python samples/study_remainder.py`.

Captures q, k, v of the small model, runs every method on them at the same density, and writes tables and plots to
docs/results/remainder-*: relative output error, CPU time, both over density, ablations of `aurora`, synthetic fields,
paired renders, and whether aurora meets its bar. What is done of it is kept in a folder, so that a run that was killed
goes on where it stopped; the results are written together at the end. Needs the `metrics` extra for the renders.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from dit_accel.compare.candidates import parse_candidate
from dit_accel.compare.tables import summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.methods.registry import get_method
from dit_accel.models import load_pipeline
from dit_accel.presets import Preset, load_preset
from dit_accel.samples import remainder_cases as study
from dit_accel.samples.captured_attention import Call, captured, synthetic
from dit_accel.samples.clip_folder import weights_digest
from dit_accel.samples.rank_methods import fingerprint, rank
from dit_accel.samples.remainder_cases import BAR_DENSITY, Case, Figure, measure
from dit_accel.samples.remainder_report import read_figures, write_all, write_figures

ON_FIELDS = (*study.SWEPT, "Rectified", "aurora, about the key", "aurora, mixed first order", "aurora, INT8")
# Renders are of this canvas: what they cost grows with the square of its tokens.
RENDERED = {"num_frames": 17, "num_inference_steps": 10}
DENSE_STEPS = 2


def runs() -> list[tuple[Case, float]]:
    """Every method at the density of the bar, some at others too."""
    swept = [(case, density) for case in study.CASES if case.label in study.SWEPT for density in study.DENSITIES]
    return [(case, BAR_DENSITY) for case in study.CASES] + [run for run in swept if run[1] != BAR_DENSITY]


@contextmanager
def one_thread() -> Iterator[None]:
    """Times are those of one thread; the model itself runs on all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def measured(
    calls: Sequence[Call], chosen: Sequence[tuple[Case, float]], prompt: str = "", earlier: Sequence[Call] = ()
) -> list[Figure]:
    """Figures of the calls on one thread, after a run that warms up; `earlier`: see `measure`."""
    with one_thread():
        references = [F.scaled_dot_product_attention(*call.qkv) for call in calls]
        measure(chosen[:1], calls[:1], references[:1])
        return measure(chosen, calls, references, prompt, earlier)


def steps_before(steps: Sequence[int]) -> set[int]:
    """The steps at which methods that keep their order make it, to be judged at `steps`.

    Raises:
        SystemExit: there is no such step.
    """
    methods = [get_method(case.method, density=BAR_DENSITY, **case.parameters) for case in study.CASES]
    lives = {study.steps_of_order(method) for method in methods}
    if min(steps) < max(lives) - 1:
        raise SystemExit(f"an order is kept for {max(lives)} steps: capture step {max(lives) - 1} or later ones")
    return {step - life + 1 for step in steps for life in lives}


def on_calls(pipe: Any, preset: Preset, prompts: Sequence[str], steps: Sequence[int], kept: Path) -> list[Figure]:
    """Figures on the calls of all prompts; those of a prompt that a folder holds already are read from there."""
    figures: list[Figure] = []
    for number, prompt in enumerate(prompts):
        path = kept / f"figures-{number}.csv"
        found = read_figures(path)
        if not found:
            earlier = captured(pipe, preset.generation, prompt, number + 10, steps_before(steps))
            calls = [call for call in earlier if call.step in steps]
            found = measured(calls, runs(), prompt, earlier)
            write_figures(path, found)
        figures += found
        print(f"{number + 1} of {len(prompts)}: {prompt}", flush=True)
    return figures


def renders(pipe: Any, preset: Preset, count: int, kept: Path) -> list[str]:
    """Paired renders against dense at the density of the bar, from the same seeds."""
    if count == 0:
        return ["Not rendered in this run."]
    rule = f"density={BAR_DENSITY},dense_steps={DENSE_STEPS}"
    preset = preset.model_copy(update={"generation": preset.generation.model_copy(update=RENDERED)})
    others = ["remainder=drop", "order=bisect,tile=[2,2,16]"]
    texts = ["dense", f"aurora:{rule}", f"pisa:{rule}", *(f"aurora:{rule},{other}" for other in others)]
    candidates = [parse_candidate(text, preset) for text in texts]
    tasks, criteria = make_tasks(preset, (), count, seed=0)
    run = fingerprint(preset.repository, preset.generation, candidates, count)
    rows = rank(pipe, preset.generation, tasks, candidates, kept / "renders.csv", run)
    canvas = f"{preset.generation.num_frames} frames, {preset.generation.num_inference_steps} steps"
    head = {"prompts": len(tasks), "canvas": canvas, "schedule": f"{DENSE_STEPS} dense steps"}
    return [to_markdown(summarise(rows, criteria), head)]


def folder_of(work: Path, preset: Preset, prompts: Sequence[str], steps: Sequence[int]) -> Path:
    """Where parts of a run are kept: one folder per weights, canvas, prompts, steps and parameters of the methods."""
    methods = [get_method(c.method, density=density, **c.parameters).model_dump_json() for c, density in runs()]
    told = repr((str(preset.generation), list(prompts), list(steps), methods))
    return work / hashlib.sha256((weights_digest(preset.repository) + told).encode()).hexdigest()[:12]


def main() -> None:
    """Capture, measure, render, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan")
    parser.add_argument("--prompts", nargs="+", default=["a red ball moving right", "a blue square moving down"])
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 11, 17], help="steps to judge methods at")
    parser.add_argument("--size", type=int, default=None, help="height and width in pixels; default: the preset's")
    parser.add_argument("--frames", type=int, default=None, help="default: the preset's")
    parser.add_argument("--inference-steps", type=int, default=None, help="default: the preset's")
    parser.add_argument("--renders", type=int, default=4, help="prompts to render; 0: none")
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--work", type=Path, default=Path("work/remainder-study"), help="keeps what is done of a run")
    arguments = parser.parse_args()
    preset = load_preset(arguments.preset)
    given = {"height": arguments.size, "width": arguments.size, "num_frames": arguments.frames}
    given["num_inference_steps"] = arguments.inference_steps
    canvas = preset.generation.model_copy(update={k: v for k, v in given.items() if v is not None})
    preset = preset.model_copy(update={"generation": canvas})
    pipe = load_pipeline(preset.repository)
    kept = folder_of(arguments.work, preset, arguments.prompts, arguments.steps)
    figures = on_calls(pipe, preset, arguments.prompts, arguments.steps, kept)
    shown = renders(pipe, preset, arguments.renders, kept)
    on_fields = measured(synthetic(), [(case, BAR_DENSITY) for case in study.CASES if case.label in ON_FIELDS])
    command = shlex.join(["python", "samples/study_remainder.py", *sys.argv[1:]])
    print(write_all(figures, on_fields, shown, command, arguments.out))


if __name__ == "__main__":
    main()
