"""`generate-video`: from a prompt to a video file and a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.app import console, run_app, version_option
from dit_accel.errors import ConfigError
from dit_accel.presets import Generation, MethodSpec, Preset, list_presets, load_preset
from dit_accel.presets.schema import check_size
from dit_accel.report import environment
from dit_accel.video_io import OutputFile

DEFAULT_PRESET = "tiny-wan"
_NEEDED = "--prompt"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Option(help="What to show.")] = None,
    output: Annotated[Path | None, typer.Option(help="File to write: .mp4, .gif or .png (first frame).")] = None,
    preset: Annotated[str, typer.Option(help="Preset name or YAML file.")] = DEFAULT_PRESET,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of the second expert (Wan 2.2).")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0)] = 0,
    image: Annotated[Path | None, typer.Option(help="First frame, for image-to-video presets.")] = None,
    model: Annotated[str | None, typer.Option(help="Pipeline folder or hub id instead of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    method: Annotated[str | None, typer.Option(help="Method instead of the preset's.")] = None,
    density: Annotated[float | None, typer.Option(help="Density of the method, in (0, 1].")] = None,
    dense_steps: Annotated[int | None, typer.Option(help="First steps that run dense.")] = None,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="JSON report. Default: beside the output.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; load no model.")] = False,
    show_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and leave.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=version_option, is_eager=True)] = False,
) -> None:
    """Generate a video with an accelerated diffusion transformer. Default: the small model that ships."""
    if show_presets:
        console.print("\n".join(list_presets()), markup=False)
        return
    resolved = load_preset(preset)
    sizes = {"height": height, "width": width, "num_frames": num_frames, "fps": fps}
    sampling = {"num_inference_steps": num_inference_steps, "negative_prompt": negative_prompt}
    guidance = {"guidance_scale": guidance_scale, "guidance_scale_2": guidance_scale_2}
    resolved = _override(resolved, {**sizes, **sampling, **guidance})
    parameters = {"density": density, "dense_steps": dense_steps}
    changes = {name: value for name, value in parameters.items() if value is not None}
    resolved = _apply_method(resolved, method, changes)
    if dry_run:
        _show(resolved, model)
        return
    if not prompt:
        raise ConfigError(_NEEDED, "expected a text, for example --prompt 'a red ball moving right'")
    if (image is not None) != (resolved.task == "i2v"):
        needs = "needs" if resolved.task == "i2v" else "does not take"
        raise ConfigError("--image", f"preset {resolved.name} is {resolved.task} and {needs} an image")
    name = resolved.name.replace("/", "-")
    target = output or Path("outputs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-seed{seed}.mp4"
    _make(resolved, prompt, target, report, seed, image, model or resolved.repository, device, dtype, backend)


def _override(preset: Preset, values: dict[str, Any]) -> Preset:
    """Lay the command line's generation values over the preset's, and check them as the preset's own."""
    given = {name: value for name, value in values.items() if value is not None}
    if not given:
        return preset
    from pydantic import ValidationError

    from dit_accel.methods.registry import config_error

    try:
        generation = Generation(**{**preset.generation.model_dump(), **given})
    except ValidationError as error:
        raise config_error(error, "generation", list(Generation.model_fields)) from None
    check_size(preset.model, generation)
    return preset.model_copy(update={"generation": generation})


def _apply_method(preset: Preset, method: str | None, changes: dict[str, Any]) -> Preset:
    from dit_accel.acceleration import resolve_policy

    policy, schedule = resolve_policy(preset, method, None, dict(changes))
    chosen = MethodSpec(name=policy.name, parameters=policy.model_dump(mode="json", exclude_unset=True))
    return preset.model_copy(update={"method": chosen, "schedule": schedule})


def _show(preset: Preset, model: str | None) -> None:
    from dit_accel.estimate import EFFICIENCY, OVERHEAD, estimate

    guess = estimate(preset)
    frames, height, width = guess.grid
    console.print(preset.to_yaml().rstrip(), markup=False)
    console.print(f"model: {model or preset.repository} (not loaded)", markup=False)
    console.print(f"video tokens: {guess.tokens} ({frames} x {height} x {width})")
    console.print(f"self-attention: {guess.attention_share:.0%} of the transformer's operations when dense")
    if guess.gain is None:
        console.print("predicted gain: not known before a run, since the method decides its density")
        return
    console.print(f"expected density: {guess.density:.3f} in sparse calls, {guess.dense_share:.0%} of the calls dense")
    console.print(
        f"predicted gain of the denoising loop: {guess.gain:.2f}x (if a sparse pair costs {1 / EFFICIENCY:.1f} dense "
        f"pairs, and selecting {OVERHEAD:.0%} of dense attention)"
    )


def _make(
    preset: Preset,
    prompt: str,
    target: Path,
    report: Path | None,
    seed: int,
    image: Path | None,
    model: str,
    device: str,
    dtype: str,
    backend: str,
) -> None:
    """Check the output path, load, generate, write."""
    report = report or target.with_suffix(".json")
    with OutputFile(target) as file:
        from dit_accel.acceleration import accelerate
        from dit_accel.cli.running import call_pipeline, quiet_loading
        from dit_accel.models import load_pipeline

        quiet_loading()
        first_frame = None if image is None else _open_image(image, preset)
        console.print(f"{preset.name}: loading {model}", markup=False)
        begun = time.perf_counter()
        pipe = load_pipeline(model, device, dtype)
        loaded = time.perf_counter() - begun
        with accelerate(pipe, preset, backend=backend) as acceleration:
            frames, times = call_pipeline(pipe, preset.generation, prompt, seed, first_frame)
            run = acceleration.report()
        file.write(frames, preset.generation.fps)
        _write_report(report, preset, prompt, seed, model, {"load": loaded, **times}, run.to_dict())
        console.print(run.summary(), markup=False)
        console.print(f"denoising {times['denoise']:.1f} s, total {time.perf_counter() - begun:.1f} s")
        console.print(f"video: {target}\nreport: {report}", markup=False)


def _open_image(path: Path, preset: Preset) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise ConfigError("--image", f"cannot read {path} as an image") from None
    return picture.resize((preset.generation.width, preset.generation.height))


def _write_report(
    path: Path, preset: Preset, prompt: str, seed: int, model: str, times: dict[str, Any], run: dict[str, Any]
) -> None:
    import json
    import os

    head = {
        "prompt": prompt,
        "seed": seed,
        "model": model,
        "preset": preset.model_dump(mode="json"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "times": times,
        "environment": environment(),
    }
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps({**head, **run}, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def main() -> None:
    """Entry point of `generate-video`."""
    run_app(app, "generate-video")
