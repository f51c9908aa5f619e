"""What the demo does, without a page: one job at a time on one loaded pipeline, with progress and a way to stop."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.acceleration import accelerate
from dit_accel.errors import ConfigError
from dit_accel.extras.install import store_weights
from dit_accel.generation import call_pipeline
from dit_accel.models import TINY, call_parameters, fit_to_model, load_for_preset, stock_pipeline
from dit_accel.presets import Generation, Preset, list_presets, load_preset, streaming_preset
from dit_accel.presets.schema import TASK_INPUTS, check_size
from dit_accel.report.records import environment
from dit_accel.video.files import OutputFile, check_frames, to_uint8


class Cancelled(Exception):
    """The person asked to stop."""


@dataclass(frozen=True)
class Step:
    """One denoising step is done.

    Args:
        run: name of the run ("dense", "accelerated").
        number, total: steps done and wanted.
        seconds: what this step took.
        preview: uint8 `[H, W, 3]`, the middle frame as it is now; None where the model has no cheap preview.
    """

    run: str
    number: int
    total: int
    seconds: float
    preview: np.ndarray | None


@dataclass(frozen=True)
class Clip:
    """A finished run.

    Args:
        run: name of the run.
        frames: uint8 `[T, H, W, 3]`.
        path: the written file.
        denoise, total: seconds of the denoising loop, and of the whole call.
        report: the run's report as a dictionary.
    """

    run: str
    frames: np.ndarray
    path: Path
    denoise: float
    total: float
    report: dict[str, Any] = field(repr=False)


Event = Step | Clip


class Studio:
    """Holds the loaded pipeline and runs one job at a time.

    Args:
        preset: preset whose model is loaded, once, when the first job needs it.
        output_dir: folder of all written files.
        device, dtype: as in `load_for_preset`.
        model: pipeline folder or hub id instead of the preset's, or "tiny".

    Raises:
        ConfigError: a preset whose task needs more than a prompt, or whose pipeline does not tell its steps.
    """

    def __init__(
        self, preset: str, output_dir: Path, device: str = "auto", dtype: str = "auto", model: str | None = None
    ) -> None:
        self._name = preset
        self.preset = fit_to_model(load_preset(preset), model)
        if inputs := TASK_INPUTS[self.preset.task].required:
            raise ConfigError("--preset", f"{preset} needs {' and '.join(inputs)}, which the page does not take")
        if "callback_on_step_end" not in call_parameters(stock_pipeline(self.preset.pipeline)):
            raise ConfigError(
                "--preset", f"{preset} is for {self.preset.pipeline}, whose steps the page cannot follow or stop"
            )
        self.output_dir = output_dir
        self.model, self._where = model, (device, dtype)
        self._pipe: Any = None
        self._busy = threading.Lock()
        self._stop = threading.Event()
        self._count = 0

    def presets(self) -> list[str]:
        """Names of all presets of the model that is loaded."""
        names = [name for name in list_presets() if load_preset(name).repository == self.preset.repository]
        return names if self.preset.name in names else [self.preset.name, *names]

    def for_streams(self) -> Studio:
        """The studio of the model's causal sibling, else this one; both run one job at a time together."""
        preset = streaming_preset(self._name, self.model not in (None, self.preset.repository))
        if preset.repository == self.preset.repository:
            return self
        other = copy(self)
        other.preset, other.model, other._pipe = preset, None, None
        return other

    @property
    def is_busy(self) -> bool:
        """A job is running."""
        return self._busy.locked()

    @property
    def is_stopping(self) -> bool:
        """The running job was asked to stop."""
        return self._stop.is_set()

    @contextmanager
    def job(self) -> Iterator[None]:
        """Keep other jobs out while this thread runs one; `load` gives it the pipeline.

        Raises:
            RuntimeError: another job is running.
        """
        self._begin()
        try:
            yield
        finally:
            self._end()

    def _begin(self) -> None:
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("another job is running; wait for it or cancel it")
        self._stop.clear()

    def _end(self) -> None:
        # What a job held is free by now; give it back to the device, where others may want it.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._busy.release()

    def cancel(self) -> bool:
        """Ask the running job to stop after its step; False when none runs."""
        if not self.is_busy:
            return False
        self._stop.set()
        return True

    def generation(self, preset: Preset, **values: Any) -> Generation:
        """The preset's generation with `values` laid over it, checked.

        Raises:
            ConfigError: a size the model cannot make.
        """
        from pydantic import ValidationError

        from dit_accel.methods.registry import config_error

        try:
            generation = Generation(**{**preset.generation.model_dump(), **values})
        except ValidationError as error:
            raise config_error(error, "generation", list(Generation.model_fields)) from None
        if self.model != TINY:
            check_size(preset.model, generation)
        return generation

    def run(self, runs: dict[str, Preset], generation: Generation, prompt: str, seed: int) -> Iterator[Event]:
        """Generate once per preset, same prompt, size and seed, and yield what happens as it happens.

        Closing the iterator stops the job, as `cancel` does; both free its memory.

        Raises:
            RuntimeError: another job is running.
            Cancelled: the job was stopped.
        """
        self._begin()
        events: queue.Queue[Event | BaseException | None] = queue.Queue()
        worker = threading.Thread(
            target=self._work, args=(runs, generation, prompt, seed, events), name="dit-accel-demo", daemon=True
        )
        try:
            worker.start()
            while (event := events.get()) is not None:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self._stop.set()
            worker.join()
            self._end()

    def _work(
        self,
        runs: dict[str, Preset],
        generation: Generation,
        prompt: str,
        seed: int,
        events: queue.Queue[Event | BaseException | None],
    ) -> None:
        try:
            pipe = self.load()
            for name, preset in runs.items():
                events.put(self._one(pipe, name, preset, generation, prompt, seed, events.put))
            events.put(None)
        except BaseException as error:
            events.put(error)

    def _one(
        self,
        pipe: Any,
        name: str,
        preset: Preset,
        generation: Generation,
        prompt: str,
        seed: int,
        tell: Callable[[Event], None],
    ) -> Clip:
        last = time.perf_counter()

        def on_step(step: int, latents: torch.Tensor) -> None:
            nonlocal last
            if self._stop.is_set():
                raise Cancelled("stopped")
            seconds = time.perf_counter() - last
            tell(Step(name, step + 1, generation.num_inference_steps, seconds, preview(pipe, latents)))
            last = time.perf_counter()

        self._count += 1
        target = self.output_dir / f"{time.strftime('%Y%m%d-%H%M%S')}-{self._count:04d}-{name}.mp4"
        with OutputFile(target) as file, accelerate(pipe, preset) as acceleration:
            frames, times = call_pipeline(pipe, generation, prompt, seed, on_step=on_step)
            check_frames(frames)
            pixels = to_uint8(frames)
            file.write(pixels, generation.fps)
            report = {
                "prompt": prompt,
                "seed": seed,
                "model": self.model or self.preset.repository,
                "preset": preset.model_copy(update={"generation": generation}).model_dump(mode="json"),
                "times": times,
                "environment": environment(),
                **acceleration.report().to_dict(),
            }
        return Clip(name, pixels, target, times["denoise"], times["total"], report)

    def load(self) -> Any:
        """The pipeline, loaded when it was not; for the job that runs."""
        if self._pipe is None:
            pipe = load_for_preset(self.preset, self.model, *self._where)
            store_weights(self.preset.extras, pipe, self._where[0])
            self._pipe = pipe
        return self._pipe


@torch.no_grad()
def preview(pipe: Any, latents: torch.Tensor) -> np.ndarray | None:
    """The middle latent frame, decoded alone: uint8 `[H, W, 3]`; None for latents that are not those of a video VAE."""
    config: Any = getattr(pipe.vae, "config", None)
    if latents.ndim != 5 or not hasattr(config, "latents_mean"):
        return None
    middle = latents[:1, :, latents.shape[2] // 2 :][:, :, :1].to(pipe.vae.dtype)
    shape = (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(x, device=middle.device).view(shape) for x in (config.latents_mean, config.latents_std))
    image = pipe.vae.decode(middle * std.to(middle) + mean.to(middle), return_dict=False)[0]
    return np.asarray(((image[0, :, 0].float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu())
