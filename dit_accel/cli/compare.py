"""`dit-accel compare`: presets and methods against dense, on the same prompts and seeds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.app import console, errors

DEFAULT_OUTPUT = Path("outputs/compare")


def compare(
    candidates: Annotated[
        list[str] | None,
        typer.Argument(
            help="PRESET, FILE.yaml or METHOD[:KEY=VALUE,...]. Default: all variants of the preset's model."
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="Preset that gives model, sizes and the schedule of methods.")
    ] = "tiny-wan",
    prompts: Annotated[
        list[str] | None, typer.Option(help="Prompts. Default: held-out captions (small model).")
    ] = None,
    num_prompts: Annotated[int, typer.Option(help="How many held-out captions.", min=1)] = 4,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds per prompt.", min=1)] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.", min=0)] = 0,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    ceiling: Annotated[bool, typer.Option("--ceiling/--no-ceiling", help="Dense with our kernel too.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for tables, plot and videos.")] = DEFAULT_OUTPUT,
    image: Annotated[Path | None, typer.Option(help="Image, for presets that need one.")] = None,
    last_image: Annotated[Path | None, typer.Option(help="Last frame, for presets that need one.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Mask, for presets that need one.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video, for presets that take one.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Pipeline folder or hub id instead of the preset's, or tiny: small random weights."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
) -> None:
    """Compare time, closeness to dense, steadiness and prompt following; write CSV, Markdown, a plot and videos."""
    from dit_accel.bench.table import stamp, stream_csv
    from dit_accel.cli.bench import command_line
    from dit_accel.cli.inputs import check_inputs, read_inputs
    from dit_accel.compare.candidates import all_candidates
    from dit_accel.compare.runner import run_all
    from dit_accel.compare.tables import plot_pareto, summarise, to_markdown
    from dit_accel.compare.tasks import make_tasks
    from dit_accel.extras.install import store_weights
    from dit_accel.kernels.registry import check_backend
    from dit_accel.metrics import check_metrics, why_no_lpips
    from dit_accel.models import fit_to_model, load_for_preset, quiet_loading
    from dit_accel.presets import load_preset

    check_metrics(plots=True)
    check_backend(backend)
    base = fit_to_model(load_preset(preset), model)
    given = {"image": image, "last_image": last_image, "mask": mask, "video": video}
    check_inputs(base, given)
    generation = base.generation
    if num_inference_steps is not None:
        generation = generation.model_copy(update={"num_inference_steps": num_inference_steps})
    chosen = all_candidates(candidates or [], base, ceiling)
    tasks, criteria = make_tasks(base, prompts or [], num_prompts, seed)
    inputs = read_inputs(base, given)
    quiet_loading()
    pipe = load_for_preset(base, model, device, dtype)
    store_weights(base.extras, pipe, device)
    common = {**stamp(), "command": command_line()}
    rows: list[Any] = []

    def produced() -> Any:
        for number, (outcomes, made) in enumerate(run_all(pipe, generation, tasks, chosen, rounds, backend, inputs)):
            _write_video(output, number, outcomes, generation.fps)
            errors.print(f"prompt {number + 1} of {len(tasks)}: {tasks[number].prompt}", markup=False)
            yield from made

    rows = list(stream_csv(output / "compare.csv", produced(), common))
    lines = summarise(rows, criteria)
    head = {**common, "prompts": len(tasks), "rounds": rounds, "generation": str(generation)}
    if why_no_lpips() is not None:
        head["LPIPS"] = f"not computed: {why_no_lpips()}"
    text = to_markdown(lines, head)
    (output / "compare.md").write_text(text, encoding="utf-8")
    plot_pareto(lines, output / "pareto.png")
    console.print(text, markup=False)
    console.print(f"written: {output}/compare.csv, compare.md, pareto.png and the videos", markup=False)


def _write_video(folder: Path, number: int, outcomes: Any, fps: int) -> None:
    from dit_accel.compare.video import side_by_side
    from dit_accel.video.files import OutputFile

    clip = side_by_side([(outcome.candidate.label, outcome.clip) for outcome in outcomes])
    suffix = ".mp4" if len(clip) > 1 else ".png"
    with OutputFile(folder / f"side-by-side-{number}{suffix}") as file:
        file.write(clip, fps)
