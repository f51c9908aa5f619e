"""Run a pipeline with a progress bar and take the times of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_accel.cli.app import errors
from dit_accel.presets import Generation


def quiet_loading() -> None:
    """Switch off the libraries' own bars for loading weights; our line says what is loaded."""
    import diffusers
    import transformers

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def call_pipeline(
    pipe: Any,
    generation: Generation,
    prompt: str,
    seed: int,
    image: Any = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Generate once.

    Args:
        pipe: a Diffusers pipeline.
        generation: sizes and sampling.
        prompt: what to show.
        seed: seed of the noise.
        image: first frame, for image-to-video.
        on_step: called after each step with its number, from 0, and the latents; an exception it raises ends the run.

    Returns:
        Frames, float `[T, H, W, 3]` in [0, 1], and the times in seconds: "steps" (each), "denoise", "total".
    """
    values = generation.model_dump(exclude_none=True, exclude={"fps"})
    if image is not None:
        values["image"] = image
    pipe.set_progress_bar_config(disable=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("denoising", total=generation.num_inference_steps)
        marks = [time.perf_counter()]

        def advance(_pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            if (
                torch.cuda.is_available()
            ):  # kernels run on after their launch; without this a step would seem to take none
                torch.cuda.synchronize()
            marks.append(time.perf_counter())
            if on_step is not None:
                on_step(step, kwargs["latents"])
            bar.update(task, advance=1, description=f"denoising {marks[-1] - marks[-2]:.2f} s/step")
            return kwargs

        generator = torch.Generator("cpu").manual_seed(seed)
        result = pipe(prompt=prompt, generator=generator, output_type="np", callback_on_step_end=advance, **values)
    steps = [later - earlier for earlier, later in pairwise(marks)]
    times = {"steps": steps, "denoise": sum(steps), "total": time.perf_counter() - marks[0]}
    return np.asarray(result.frames[0]), times
