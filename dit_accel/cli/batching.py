"""`generate-video --prompts`: many generations, here or on a Ray cluster, with a manifest and `--resume`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dit_accel.batch import Item, Manifest, plan_batch, read_prompts, run_batch
from dit_accel.cli.app import EXIT_FAILURE, console, errors
from dit_accel.cli.inputs import check_inputs
from dit_accel.cli.making import PipelineHolder, Run, make
from dit_accel.cli.overrides import METHOD_OPTIONS, check_seconds, frames_of, resolve
from dit_accel.errors import ConfigError
from dit_accel.presets import Generation


@dataclass(frozen=True)
class Batch:
    """A file of prompts and what holds for all its lines.

    Args:
        prompts: the file.
        output_dir: folder of the results.
        resume: go on with an earlier run.
        preset: preset of lines that name none.
        options: overrides of all lines, None where left out; a line's own go before them.
        inputs: files of all lines; a line's own image goes before them.
        model, device, dtype, backend: as in one generation.
        seed: of lines that name none. Default 0.
        seconds: length of lines that name no number of frames, at the frame rate of each. Default None: the preset's.
    """

    prompts: Path
    output_dir: Path | None
    resume: bool
    preset: str
    options: dict[str, Any]
    inputs: dict[str, Path | None]
    model: str | None
    device: str
    dtype: str
    backend: str
    seed: int = 0
    seconds: float | None = None

    def run_of(self, item: Item) -> Run:
        """The generation of one line.

        Raises:
            ConfigError: values that its preset does not take.
        """
        name, options = item.preset or self.preset, {**self.options, **item.overrides}
        preset = resolve(name, options, self.model)
        if self.seconds is not None and item.overrides.get("num_frames") is None:
            frames = frames_of(self.seconds, None, preset, None)
            preset = resolve(name, {**options, "num_frames": frames}, self.model)
        inputs = dict(self.inputs)
        if item.image is not None:
            # Relative to the file that names it, wherever the command was started.
            inputs["image"] = self.prompts.parent / item.image
        check_inputs(preset, inputs)
        return Run(preset, item.prompt, item.seed, inputs, self.model, self.device, self.dtype, self.backend)

    def plan(self, item: Item) -> tuple[str, str]:
        """Name of a line's result, and its key; see `plan_batch`.

        Raises:
            ConfigError: see `run_of`; an image that cannot be read.
        """
        run = self.run_of(item)
        return item.file_name(".png" if run.preset.makes_image else ".mp4"), run.key()


def run_prompts(batch: Batch, conflicts: list[str], ray: str | None, workers: int | None) -> None:
    """Run a batch and print one summary line; leaves with 1 when a line failed.

    Args:
        batch: what to run.
        conflicts: options that were given and do not go with a batch.
        ray: address of a Ray cluster, "local" for one on this machine; None: run here.
        workers: workers on the cluster. None: one.

    Raises:
        ConfigError: conflicting options, no folder, a file that cannot be read.
    """
    if conflicts:
        raise ConfigError(conflicts[0], "does not go with --prompts")
    if batch.output_dir is None:
        raise ConfigError("--output-dir", "--prompts needs a folder for its results")
    if workers is not None and ray is None:
        raise ConfigError("--ray-workers", "goes with --ray")
    check_seconds(batch.seconds, batch.options.get("num_frames"))
    items = read_prompts(batch.prompts, (*Generation.model_fields, *METHOD_OPTIONS), batch.seed)
    manifest = Manifest(batch.output_dir, batch.resume)
    jobs = plan_batch(items, manifest, batch.plan, _tell)
    if ray is None:
        holder = PipelineHolder()
        done = run_batch(jobs, manifest, lambda item, path: make(batch.run_of(item), path, None, holder), _tell)
    else:
        from dit_accel.cli.cluster import run_on_ray

        done = run_on_ray(jobs, manifest, batch, _tell, ray, workers or 1)
    console.print(f"{done} of {len(items)} done")
    if done < len(items):
        raise typer.Exit(EXIT_FAILURE)


def _tell(line: str) -> None:
    errors.print(line, markup=False)
