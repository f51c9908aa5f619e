"""`generate-video`: from a prompt to a video or image file and a report."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.app import console, run_app, version_option
from dit_accel.cli.stream import SETTINGS_HELP, is_stream, run_stream
from dit_accel.errors import ConfigError
from dit_accel.presets import Preset, list_presets, load_preset
from dit_accel.report import environment
from dit_accel.video_io import OutputFile

DEFAULT_PRESET = "tiny-wan"
_NEEDED = "--prompt"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write: .mp4, .gif or .png (of a video: its first frame).")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset name or YAML file.")] = DEFAULT_PRESET,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of the second expert (Wan 2.2).")] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance on top of the embedded one (HunyuanVideo, FLUX).")
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    image: Annotated[
        Path | None, typer.Option(help="First frame, image to edit or fill, or reference image, as the task says.")
    ] = None,
    last_image: Annotated[Path | None, typer.Option(help="Last frame, for first-and-last-frame presets.")] = None,
    mask: Annotated[Path | None, typer.Option(help="What to fill: white, for fill presets.")] = None,
    video: Annotated[Path | None, typer.Option(help="Control video, for VACE presets.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Pipeline folder or hub id instead of the preset's, or tiny: small random weights."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    method: Annotated[str | None, typer.Option(help="Method instead of the preset's.")] = None,
    density: Annotated[float | None, typer.Option(help="Density of the method, in (0, 1].")] = None,
    dense_steps: Annotated[int | None, typer.Option(help="First steps that run dense.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="JSON report. Default: beside the output.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write the video while it is made, chunk by chunk.")] = False,
    num_chunks: Annotated[int | None, typer.Option(help="Chunks of a stream.", min=1)] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="YAML list of {chunk, prompt, mode, over}.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Read new prompts of a stream from standard input.")] = False,
    stream_settings: Annotated[str | None, typer.Option(help=SETTINGS_HELP)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Causal weights for a stream.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA to merge into the checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; load no model.")] = False,
    show_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and leave.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=version_option, is_eager=True)] = False,
) -> None:
    """Generate a video or an image with an accelerated diffusion transformer. Default: the small model that ships."""
    if show_presets:
        console.print("\n".join(list_presets()), markup=False)
        return
    if is_stream(context):
        run_stream(context)
        return
    from dit_accel.cli.inputs import check_inputs
    from dit_accel.cli.overrides import override_generation, override_method
    from dit_accel.cli.showing import show_preset

    sizes = {"height": height, "width": width, "num_frames": num_frames, "fps": fps}
    sampling = {"num_inference_steps": num_inference_steps, "negative_prompt": negative_prompt}
    guidance = {
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "true_cfg_scale": true_cfg_scale,
    }
    resolved = override_generation(load_preset(preset), {**sizes, **sampling, **guidance}, model)
    resolved = override_method(resolved, method, {"density": density, "dense_steps": dense_steps})
    if dry_run:
        show_preset(resolved, model, device)
        return
    if not prompt:
        raise ConfigError(_NEEDED, "expected a text, for example --prompt 'a red ball moving right'")
    inputs = {"image": image, "last_image": last_image, "mask": mask, "video": video}
    check_inputs(resolved, inputs)
    run = _Run(resolved, prompt, seed, inputs, model, device, dtype, backend)
    _make(run, output or _default_output(resolved, seed), report)


@dataclass(frozen=True)
class _Run:
    """Everything that one generation needs to know."""

    preset: Preset
    prompt: str
    seed: int
    inputs: dict[str, Path | None]
    model: str | None
    device: str
    dtype: str
    backend: str


def _default_output(preset: Preset, seed: int) -> Path:
    suffix = ".png" if preset.makes_image else ".mp4"
    name = preset.name.replace("/", "-")
    return Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-seed{seed}{suffix}"


def _make(run: _Run, target: Path, report: Path | None) -> None:
    """Check the output path, load, generate, write."""
    preset, report = run.preset, report or target.with_suffix(".json")
    if preset.makes_image and target.suffix.lower() != ".png":
        raise ConfigError("--output", f"preset {preset.name} makes an image: expected a name that ends in .png")
    with OutputFile(target) as file:
        from dit_accel.acceleration import accelerate
        from dit_accel.cli.inputs import read_inputs
        from dit_accel.cli.running import call_pipeline, quiet_loading
        from dit_accel.models import load_for_preset

        quiet_loading()
        inputs = read_inputs(preset, run.inputs)
        console.print(f"{preset.name}: loading {run.model or preset.repository}", markup=False)
        begun = time.perf_counter()
        pipe = load_for_preset(preset, run.model, run.device, run.dtype)
        loaded = time.perf_counter() - begun
        console.print(f"loaded in {loaded:.1f} s, denoising {preset.generation.num_inference_steps} steps")
        with accelerate(pipe, preset, backend=run.backend) as acceleration:
            frames, times = call_pipeline(pipe, preset.generation, run.prompt, run.seed, inputs)
            result = acceleration.report()
        file.write(frames, preset.generation.fps)
        _write_report(report, run, {"load": loaded, **times}, result.to_dict())
        console.print(result.summary(), markup=False)
        console.print(f"denoising {times['denoise']:.1f} s, total {time.perf_counter() - begun:.1f} s")
        kind = "image" if preset.makes_image else "video"
        console.print(f"{kind}: {target}\nreport: {report}", markup=False)


def _write_report(path: Path, run: _Run, times: dict[str, Any], calls: dict[str, Any]) -> None:
    import json
    import os

    head = {
        "prompt": run.prompt,
        "seed": run.seed,
        "model": run.model or run.preset.repository,
        "preset": run.preset.model_dump(mode="json"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "times": times,
        "environment": environment(),
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({**head, **calls}, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Entry point of `generate-video`."""
    run_app(app, "generate-video")
