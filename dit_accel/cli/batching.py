"""`generate-video --prompts`: many generations, here or on a Ray cluster, with a manifest and `--resume`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dit_accel.batch import Item, Manifest, read_prompts, run_batch
from dit_accel.cli.app import EXIT_FAILURE, console, errors
from dit_accel.cli.inputs import check_inputs
from dit_accel.cli.making import PipelineHolder, Run, make
from dit_accel.cli.overrides import METHOD_OPTIONS, resolve
from dit_accel.errors import ConfigError
from dit_accel.presets import Generation, load_preset


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

    def run_of(self, item: Item) -> Run:
        """The generation of one line.

        Raises:
            ConfigError: values that its preset does not take.
        """
        preset = resolve(item.preset or self.preset, {**self.options, **item.overrides}, self.model)
        inputs = dict(self.inputs)
        if item.image is not None:
            # Relative to the file that names it, wherever the command was started.
            inputs["image"] = self.prompts.parent / item.image
        check_inputs(preset, inputs)
        return Run(preset, item.prompt, item.seed, inputs, self.model, self.device, self.dtype, self.backend)

    def extension(self, item: Item) -> str:
        """Extension of a line's result: an image's, where its preset makes images."""
        return ".png" if load_preset(item.preset or self.preset).makes_image else ".mp4"


def run_prompts(batch: Batch, conflicts: list[str], ray: str | None, workers: int) -> None:
    """Run a batch and print one summary line; leaves with 1 when a line failed.

    Args:
        batch: what to run.
        conflicts: options that were given and do not go with a batch.
        ray: address of a Ray cluster, "local" for one on this machine; None: run here.
        workers: workers on the cluster.

    Raises:
        ConfigError: conflicting options, no folder, a file that cannot be read.
    """
    if conflicts:
        raise ConfigError(conflicts[0], "does not go with --prompts")
    if batch.output_dir is None:
        raise ConfigError("--output-dir", "--prompts needs a folder for its results")
    items = read_prompts(batch.prompts, (*Generation.model_fields, *METHOD_OPTIONS))
    manifest = Manifest(batch.output_dir, batch.resume)
    if ray is None:
        holder = PipelineHolder()
        done, total = run_batch(
            items, manifest, lambda item, path: make(batch.run_of(item), path, None, holder), _tell, batch.extension
        )
    else:
        from dit_accel.cli.cluster import run_on_ray

        done, total = run_on_ray(items, manifest, batch, _tell, ray, workers)
    console.print(f"{done} of {total} done")
    if done < total:
        raise typer.Exit(EXIT_FAILURE)


def _tell(line: str) -> None:
    errors.print(line, markup=False)
