"""Call a pipeline once, with a progress bar, and take the times of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dit_accel.errors import UnsupportedError
from dit_accel.models import call_arguments, call_parameters, set_guider
from dit_accel.presets import Generation


class _Ticks:
    """What a pipeline updates after every step, in place of its own progress bar."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def update(self, n: int = 1) -> None:
        """One more step is done."""
        self.tick()


def call_pipeline(
    pipe: Any,
    generation: Generation,
    prompt: str,
    seed: int,
    inputs: dict[str, Any] | None = None,
    on_step: Callable[[int, torch.Tensor], None] | None = None,
    show: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[np.ndarray, dict[str, Any]]:
    """Generate once.

    Args:
        pipe: a Diffusers pipeline.
        generation: sizes and sampling.
        prompt: what to show.
        seed: seed of the noise.
        inputs: further arguments of the call, such as images. Default: none.
        on_step: called after each step with its number, from 0, and the latents; an exception it raises ends the run.
        show: draw a progress bar on standard error. Default True.
        clock: what the times are read from. Default: the wall clock.

    Returns:
        Frames (one, for an image), float `[T, H, W, 3]` in [0, 1], and the times in seconds: "steps" (each), "denoise",
        "total".

    Raises:
        UnsupportedError: `on_step` on a pipeline that has no step callback.
    """
    set_guider(pipe, generation)
    arguments = {**call_arguments(pipe, generation), **(inputs or {}), "prompt": prompt, "output_type": "np"}
    if on_step is not None:
        arguments["callback_on_step_end"] = _step_callback(pipe, on_step)
    begun = clock()
    marks: list[float] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("denoising", total=generation.num_inference_steps)

        def tick() -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # kernels run on after their launch: a step would seem to take no time
            marks.append(clock())
            bar.update(task, advance=1, description=f"denoising {marks[-1] - marks[-2]:.2f} s/step")

        @contextmanager
        def progress_bar(*args: Any, **kwargs: Any) -> Iterator[_Ticks]:
            marks.append(clock())
            yield _Ticks(tick)

        # Not every pipeline has a step callback, but all open a progress bar around their loop.
        pipe.progress_bar = progress_bar
        try:
            result = pipe(generator=torch.Generator("cpu").manual_seed(seed), **arguments)
        finally:
            del pipe.progress_bar
    steps = [later - earlier for earlier, later in pairwise(marks)]
    times = {"steps": steps, "denoise": sum(steps), "total": clock() - begun}
    return np.asarray(result.frames[0] if hasattr(result, "frames") else result.images), times


def _step_callback(pipe: Any, on_step: Callable[[int, torch.Tensor], None]) -> Callable[..., dict[str, Any]]:
    if "callback_on_step_end" not in call_parameters(type(pipe)):
        raise UnsupportedError(f"{type(pipe).__name__} has no callback_on_step_end, so its steps cannot be followed")

    def callback(_pipe: Any, step: int, _timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        on_step(step, kwargs["latents"])
        return kwargs

    return callback
