"""`generate-video`: from a prompt to a video or image file and a report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.batch import LARGEST_SEED
from dit_accel.cli.app import console, run_app, version_option
from dit_accel.cli.parallel import Degrees, check_single, joined, processes_here
from dit_accel.cli.stream import METHOD_HELP, SETTINGS_HELP, is_stream, run_stream
from dit_accel.errors import ConfigError
from dit_accel.presets import list_presets, load_preset

DEFAULT_PRESET = "tiny-wan"
_NEEDED = "--prompt"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def generate(
    context: typer.Context,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to show. Several: one after the other in one video (CogVideoX)."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File to write: .mp4, .gif or .png (of a video: its first frame).")
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset name or YAML file.")] = DEFAULT_PRESET,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Length, in place of --num-frames.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="Classifier-free guidance.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="Guidance of the second expert (Wan 2.2).")] = None,
    true_cfg_scale: Annotated[
        float | None, typer.Option(help="Guidance on top of the embedded one (HunyuanVideo, FLUX).")
    ] = None,
    fps: Annotated[int | None, typer.Option(help="Frames per second of the file.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=LARGEST_SEED)] = 0,
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
    method: Annotated[str | None, typer.Option(help=METHOD_HELP)] = None,
    density: Annotated[float | None, typer.Option(help="Density of the method, in (0, 1].")] = None,
    dense_steps: Annotated[int | None, typer.Option(help="First steps that run dense.")] = None,
    max_error: Annotated[
        float | None, typer.Option(help="Guard: budget for the relative error of each attention call.")
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="JSON report. Default: beside the output.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Write the video while it is made, chunk by chunk.")] = False,
    num_chunks: Annotated[int | None, typer.Option(help="Chunks of a stream.", min=1)] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="YAML list of {chunk, prompt, mode, over}.")] = None,
    live: Annotated[bool, typer.Option("--live", help="Read new prompts of a stream from standard input.")] = False,
    stream_settings: Annotated[str | None, typer.Option(help=SETTINGS_HELP)] = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Causal weights for a stream.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA to merge into the checkpoint.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Many generations: a file with one JSON object per line, see docs/batches.md.")
    ] = None,
    output_dir: Annotated[Path | None, typer.Option(help="Folder of the results of --prompts.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an earlier run of --prompts.")] = False,
    ray: Annotated[
        str | None, typer.Option(help="Spread --prompts over this Ray cluster; local: this machine.")
    ] = None,
    ray_workers: Annotated[int | None, typer.Option(help="Workers on the Ray cluster. Default: 1.", min=1)] = None,
    ulysses_degree: Annotated[
        int, typer.Option(help="GPUs that share one video, as many as torchrun started; see docs/batches.md.", min=1)
    ] = 1,
    ring_degree: Annotated[
        int, typer.Option(help="The same by ring attention, for dense and static methods.", min=1)
    ] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run; load no model.")] = False,
    show_presets: Annotated[bool, typer.Option("--list-presets", help="List the presets and leave.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=version_option, is_eager=True)] = False,
) -> None:
    """Generate a video or an image with an accelerated diffusion transformer. Default: the small model that ships."""
    if show_presets:
        console.print("\n".join(list_presets()), markup=False)
        return
    processes, degrees = processes_here(), Degrees(ulysses_degree, ring_degree)
    if not dry_run:
        check_single({"--stream": stream, "--prompts": prompts is not None}, processes)
        degrees.check(processes)
    if is_stream(context):
        run_stream(context)
        return
    from dit_accel.cli.inputs import check_inputs
    from dit_accel.cli.making import PipelineHolder, Run, default_output, make, produce
    from dit_accel.cli.overrides import frames_of, resolve
    from dit_accel.cli.several import check_several, describe, make_several, plan_several
    from dit_accel.cli.showing import show_preset
    from dit_accel.kernels.registry import check_backend

    check_backend(backend)

    several = prompt is not None and len(prompt) > 1
    options = {
        "height": height,
        "width": width,
        "num_frames": num_frames,
        "fps": fps,
        "num_inference_steps": num_inference_steps,
        "negative_prompt": negative_prompt,
        "guidance_scale": guidance_scale,
        "guidance_scale_2": guidance_scale_2,
        "true_cfg_scale": true_cfg_scale,
        "method": method,
        "density": density,
        "dense_steps": dense_steps,
        "max_error": max_error,
    }
    inputs = {"image": image, "last_image": last_image, "mask": mask, "video": video}
    if prompts is not None:
        from dit_accel.cli.batching import Batch, run_prompts

        not_with = {"--prompt": prompt or None, "--output": output, "--report": report, "--dry-run": dry_run or None}
        common = (preset, options, inputs, model, device, dtype, backend, seed, seconds)
        batch = Batch(prompts, output_dir, resume, *common)
        run_prompts(batch, [name for name, value in not_with.items() if value is not None], ray, ray_workers)
        return
    only = {"--output-dir": output_dir, "--resume": resume or None, "--ray": ray, "--ray-workers": ray_workers}
    for name, value in only.items():
        if value is not None:
            raise ConfigError(name, "goes with --prompts")
    frames = num_frames if seconds is None else frames_of(seconds, num_frames, load_preset(preset), fps)
    options["num_frames"] = None if several else frames  # of several prompts: frames of a clip
    resolved = resolve(preset, options, model)
    if several:
        no_use = {"ulysses_degree": degrees.ulysses, "ring_degree": degrees.ring, "backend": backend}
        usual = {"ulysses_degree": 1, "ring_degree": 1, "backend": "auto"}
        check_several(resolved, {**options, **{k: v for k, v in no_use.items() if v != usual[k]}})
    degrees.check_preset(resolved, resolved.model.heads if model is None else None)
    if dry_run:
        show_preset(resolved, model, device)
        if several:
            console.print(describe(*plan_several(resolved, len(prompt or []), frames)))
        return
    if not prompt or not all(prompt):
        raise ConfigError(_NEEDED, "expected a text, for example --prompt 'a red ball moving right'")
    check_inputs(resolved, inputs)
    if several:
        run = Run(resolved, prompt[0], seed, inputs, model, device, dtype, backend)
        make_several(run, prompt, frames, output or default_output(resolved, seed), report)
        return
    with joined(processes, device) as where:
        run = Run(resolved, prompt[0], seed, inputs, model, where, dtype, backend, degrees)
        if processes.is_first:
            make(run, output or default_output(resolved, seed), report, PipelineHolder())
        else:
            produce(run, PipelineHolder())


def main() -> None:
    """Entry point of `generate-video`."""
    run_app(app, "generate-video")
