"""`dit-accel calibrate`: measure what each head can bear, and write a preset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.app import console, errors


def calibrate(
    max_error: Annotated[float | None, typer.Option(help="Budget for the relative error of a layer.", min=0)] = None,
    density: Annotated[float | None, typer.Option(help="Budget for the mean density, instead.", min=0, max=1)] = None,
    max_time: Annotated[
        float | None, typer.Option(help="Budget for attention's time as a share of dense, instead.", min=0, max=1)
    ] = None,
    preset: Annotated[str, typer.Option(help="Preset that gives model, sizes and schedule.")] = "tiny-wan",
    candidates: Annotated[
        list[str] | None, typer.Option(help="METHOD[:KEY=VALUE,...], once per candidate. Default: a palette of eleven.")
    ] = None,
    prompts: Annotated[list[str] | None, typer.Option(help="Prompts. Default: captions (small model).")] = None,
    num_prompts: Annotated[int, typer.Option(help="How many captions.", min=1)] = 2,
    seed: Annotated[int, typer.Option(help="Seed of the first prompt.", min=0)] = 1000,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.", min=1)] = None,
    share: Annotated[float, typer.Option(help="Share of the query blocks that is measured.", min=0.001, max=1)] = 0.25,
    every: Annotated[int, typer.Option(help="Measure every n-th step.", min=1)] = 1,
    step_ranges: Annotated[
        int | None, typer.Option(help="Ranges of steps solved apart. Default: 3 with --probes, else 1.", min=1)
    ] = None,
    probes: Annotated[
        int, typer.Option(help="Parts of the layers whose effect on the picture is measured, per range.", min=0)
    ] = 0,
    compare: Annotated[
        bool, typer.Option(help="Generate the prompts with a few solutions and keep the closest to dense.")
    ] = True,
    layer_reuse: Annotated[
        int, typer.Option(help="Instead: which layers can use the plan of one up to so many layers before.", min=0)
    ] = 0,
    output: Annotated[Path, typer.Option(help="Preset to write.")] = Path("outputs/calibrated.yaml"),
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
) -> None:
    """Run a few prompts dense, measure which method each head can bear, and write the best preset within a budget.

    With --layer-reuse the preset's method (or the one of --candidates) stays, and layers are grouped that can share
    a plan within --max-error.

    The statistics stand beside the preset (.safetensors); a run that was killed goes on from them, and another budget
    is solved from them without running the model again.
    """
    from dit_accel.calibrate.assign import Budget, can_hoist, palettes
    from dit_accel.calibrate.finalists import best_of, finalists, try_out
    from dit_accel.calibrate.layers import check_method
    from dit_accel.calibrate.run import DEFAULT_CANDIDATES, Plan, group_layers, measure
    from dit_accel.calibrate.tasks import calibration_prompts
    from dit_accel.calibrate.weights import fingerprint
    from dit_accel.calibrate.write import head_table, prediction, write_layer_preset, write_preset
    from dit_accel.cli.files import check_folder
    from dit_accel.cli.inputs import check_inputs, digests, read_inputs
    from dit_accel.compare.candidates import parse_candidate
    from dit_accel.errors import ConfigError
    from dit_accel.extras.install import store_weights
    from dit_accel.families.registry import family_of
    from dit_accel.models import fit_to_model, load_for_preset, quiet_loading
    from dit_accel.presets import load_preset

    if sum(budget is not None for budget in (max_error, density, max_time)) != 1:
        raise ConfigError("--max-error, --max-time, --density", "expected exactly one of them")
    if layer_reuse and max_error is None:
        raise ConfigError("--layer-reuse", "is solved for an error: give --max-error")
    if output.suffix not in (".yaml", ".yml"):
        raise ConfigError("--output", f"expected a name that ends in .yaml, got {str(output)!r}")
    check_folder(output, "--output")
    base = fit_to_model(load_preset(preset), model)
    given = {"image": image, "last_image": last_image, "mask": mask, "video": video}
    check_inputs(base, given)
    generation = base.generation
    if num_inference_steps is not None:
        generation = generation.model_copy(update={"num_inference_steps": num_inference_steps})
    palette = candidates or ([base.method.name] if layer_reuse else DEFAULT_CANDIDATES)
    methods = {text: parse_candidate(text, base).method for text in palette}
    if layer_reuse:
        if len(methods) > 1:
            raise ConfigError("--candidates", f"expected one method with --layer-reuse, got {len(methods)}")
        check_method(next(iter(methods.values())))
    texts = calibration_prompts(base, prompts or [], num_prompts, seed)
    quiet_loading()
    pipe = load_for_preset(base, model, device, dtype)
    common = (base, methods, texts, generation, seed, share, every, layer_reuse, fingerprint(pipe))
    store_weights(base.extras, pipe, device)
    inputs = read_inputs(base, given)
    ranges = step_ranges or (3 if probes else 1)
    parted = (1, 0) if layer_reuse else (ranges, probes)
    plan = Plan(*common, *parted, alone=max_time is not None, inputs=digests(given))
    path = output.with_suffix(".safetensors")

    def tell(line: str) -> None:
        errors.print(line, markup=False)

    held = measure(pipe, plan, path, tell, inputs)
    if layer_reuse:
        found = group_layers(held, max_error or 0.0)
        write_layer_preset(output, plan, found, held)
        console.print(f"layers that share a plan: {[list(group) for group in found.groups]}", markup=False)
        console.print(
            f"predicted error {found.error:.4f}, {found.plans} plans per step for {found.layers} layers", markup=False
        )
        console.print(f"preset: {output}", markup=False)
        return
    budget = Budget(max_error=max_error, max_density=density, max_time=max_time)
    among = palettes(plan, can_hoist(family_of(pipe.transformer))) if max_time is not None else ()
    tried = finalists(held, plan, budget, among)
    tried = tried if compare else dict(list(tried.items())[:1])
    rows = output.with_suffix(".jsonl")
    assignment = best_of(tried, try_out(pipe, plan, tried, held, rows, tell, inputs) if len(tried) > 1 else {})
    write_preset(output, plan, assignment, held)
    console.print(head_table(assignment, methods).render(), markup=False)
    console.print(prediction(assignment), markup=False)
    console.print(f"preset: {output}", markup=False)
