"""One generation: check the path, load, run, write the file and its report."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.cli.app import console
from dit_accel.cli.files import report_path, write_json
from dit_accel.cli.inputs import digests, digests_within, read_inputs
from dit_accel.cli.parallel import ALONE, Degrees
from dit_accel.errors import ConfigError
from dit_accel.flow_shift import set_flow_shift
from dit_accel.presets import Preset
from dit_accel.report.records import Report, environment
from dit_accel.video.files import OutputFile, check_frames


@dataclass(frozen=True)
class Run:
    """Everything that one generation needs to know; see the options of `generate-video`."""

    preset: Preset
    prompt: str
    seed: int
    inputs: dict[str, Path | None]
    model: str | None
    device: str
    dtype: str
    backend: str
    degrees: Degrees = ALONE

    def key(self) -> str:
        """Differs where the result would: by preset, options, model, a file that is read, or the library's version.

        Device and backend are left out: they say where it is computed, not what.

        Raises:
            ConfigError: an input that cannot be read.
        """
        preset = self.preset.model_dump(mode="json", exclude={"name", "version", "description", "source"})
        model = self.model or self.preset.repository
        files = [digests(self.inputs), digests_within([preset["method"], preset["schedule"], preset["schedule_2"]])]
        content = [metadata.version("dit_accel"), preset, model, self.prompt, self.seed, self.dtype, files]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def default_output(preset: Preset, seed: int) -> Path:
    """`outputs/`, with time, preset and seed in the name, never the prompt."""
    suffix = ".png" if preset.makes_image else ".mp4"
    name = preset.name.replace("/", "-")
    return Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-seed{seed}{suffix}"


class PipelineHolder:
    """Keeps the pipeline that was loaded last, for runs that need the same one."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._pipe: Any = None

    def get(self, run: Run) -> Any:
        """The pipeline of a run."""
        from dit_accel.models import load_for_preset

        preset = run.preset
        model = (preset.tiny if run.model == "tiny" else run.model) or preset.repository
        key = (model, preset.pipeline, run.device, run.dtype, preset.extras, run.degrees)
        if key != self._key:
            self._key = self._pipe = None  # two large models do not fit side by side
            self._pipe = load_for_preset(preset, run.model, run.device, run.dtype)
            if not run.degrees.is_alone:
                run.degrees.enable(self._pipe, run.device)
            self._key = key
        set_flow_shift(self._pipe, preset.model.flow_shift)  # sizes of one model may differ in it
        return self._pipe


def make(run: Run, target: Path, report: Path | None, holder: PipelineHolder) -> None:
    """Check the output path, load, generate, write.

    Args:
        run: what to generate.
        target: file to write.
        report: JSON report. None: beside the file.
        holder: gives the pipeline.

    Raises:
        ConfigError: a path that cannot be written, inputs that cannot be read, a model that cannot be loaded.
    """
    preset = run.preset
    if preset.makes_image and target.suffix.lower() != ".png":
        raise ConfigError("--output", f"preset {preset.name} makes an image: expected a name that ends in .png")
    with OutputFile(target) as file:
        path = report_path(report, target)
        made = produce(run, holder)
        file.write(made.frames, preset.generation.fps)
        _write_report(path, run, made)
        console.print(made.report.summary(), markup=False)
        total = made.times["load"] + made.times["total"]
        console.print(f"denoising {made.times['denoise']:.1f} s, total {total:.1f} s")
        kind = "image" if preset.makes_image else "video"
        console.print(f"{kind}: {target}\nreport: {path}", markup=False)


@dataclass(frozen=True)
class Made:
    """What one generation gave.

    Args:
        frames: float `[T, H, W, 3]` in [0, 1].
        times: seconds: "load", "steps" (each), "denoise", "total" (without loading).
        report: of the attention calls of this process.
    """

    frames: np.ndarray
    times: dict[str, Any]
    report: Report


def produce(run: Run, holder: PipelineHolder) -> Made:
    """Read the inputs, load, generate; nothing is written.

    Raises:
        ConfigError: inputs that cannot be read, a model that cannot be loaded.
        UnsupportedError: frames that are no picture (NaN).
    """
    from dit_accel.acceleration import accelerate
    from dit_accel.generation import call_pipeline
    from dit_accel.models import quiet_loading

    quiet_loading()
    preset = run.preset
    inputs = read_inputs(preset, run.inputs)
    console.print(f"{preset.name}: loading {run.model or preset.repository}", markup=False)
    begun = time.perf_counter()
    pipe = holder.get(run)
    loaded = time.perf_counter() - begun
    console.print(f"loaded in {loaded:.1f} s, denoising {preset.generation.num_inference_steps} steps")
    with accelerate(pipe, preset, backend=run.backend, offload_to=run.device) as acceleration:
        frames, times = call_pipeline(pipe, preset.generation, run.prompt, run.seed, inputs, show=not console.quiet)
        check_frames(frames)
        return Made(frames, {"load": loaded, **times}, acceleration.report())


def _write_report(path: Path, run: Run, made: Made) -> None:
    head = {
        "prompt": run.prompt,
        "seed": run.seed,
        "model": run.model or run.preset.repository,
        "preset": run.preset.model_dump(mode="json"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "times": made.times,
        "environment": environment(),
    }
    if not run.degrees.is_alone:
        # The calls below are those of the first process: all tokens of its share of the heads.
        head["parallel"] = asdict(run.degrees)
    write_json(path, {**head, **made.report.to_dict()})
