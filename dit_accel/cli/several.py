"""`generate-video --prompt A --prompt B --seconds 20`: one video from several prompts, without training (CogVideoX)."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.cli.app import console
from dit_accel.cli.files import report_path, write_json
from dit_accel.cli.making import Run
from dit_accel.errors import ConfigError
from dit_accel.presets import Preset
from dit_accel.video.files import OutputFile, check_frames

if TYPE_CHECKING:
    from dit_accel.pipelines.clip_layout import ClipLayout

_OVERLAP = 9 / 13  # of a clip, as the authors recommend
_NO_USE = ("method", "density", "dense_steps", "max_error", "backend", "ulysses_degree", "ring_degree")


def check_several(preset: Preset, options: Mapping[str, Any]) -> None:
    """Refuse a preset that cannot show several prompts, and options that this generation has no use for.

    Args:
        preset: what runs.
        options: of the command line by name, None where left out.

    Raises:
        ConfigError: names the option, and the presets that can.
    """
    if preset.pipeline != "CogVideoXPipeline" or preset.model.patch[0] != 1:
        raise ConfigError(
            "--prompt", "several prompts without a causal model need CogVideoX 1.0 (--preset cogvideox-2b or "
            f"cogvideox-5b), got {preset.name}; for Wan, use --stream with --prompts-file"
        )  # fmt: skip
    for name in _NO_USE:
        if options.get(name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')}", "several prompts run dense attention with shared keys; leave it out"
            )
    if preset.extras.cache is not None:
        raise ConfigError("extras.cache", f"several prompts cannot use a step cache, which {preset.name} has")


def plan_several(preset: Preset, prompts: int, frames: int | None) -> tuple[ClipLayout, list[int]]:
    """Clips that make a video of `frames` frames, and which prompt each of them begins to show.

    Args:
        preset: its number of frames is that of one clip.
        prompts: number of prompts.
        frames: of the video. None: the fewest that show all prompts.
    """
    from dit_accel.pipelines.clip_layout import ClipLayout

    step = preset.model.vae_temporal
    tile = 1 + (preset.generation.num_frames - 1) // step
    wanted = tile if frames is None else 1 + (frames - 1) // step
    return ClipLayout.covering(prompts, wanted, tile, round(tile * _OVERLAP))


def describe(layout: ClipLayout, order: list[int]) -> str:
    """One line for people."""
    shown = ", ".join(str(index + 1) for index in order)
    return (
        f"{layout.clips} clips of {layout.tile} latent frames, prompts {shown} with {layout.transitions} between them; "
        "dense attention with shared keys, the preset's method does not run"
    )


def make_several(run: Run, prompts: list[str], frames: int | None, target: Path, report: Path | None) -> None:
    """Load, generate, write the video and its report.

    Args:
        run: what to generate; its preset's number of frames is that of one clip, and its prompt is not used.
        prompts: two or more, in order.
        frames: of the video. Default: the shortest video that shows all prompts.
        target: file to write.
        report: JSON report. Default: beside the file.
    """
    generation = run.preset.generation
    layout, order = plan_several(run.preset, len(prompts), frames)
    with OutputFile(target) as file:
        path = report_path(report, target)
        import torch

        from dit_accel.extras.cache import Guidance
        from dit_accel.extras.install import install_extras
        from dit_accel.models import load_for_preset, quiet_loading
        from dit_accel.pipelines.ditctrl import MultiPromptCogVideoXPipeline

        quiet_loading()
        console.print(f"{run.preset.name}: loading {run.model or run.preset.repository}", markup=False)
        pipe = load_for_preset(run.preset, run.model, run.device, run.dtype, MultiPromptCogVideoXPipeline)
        guidance = Guidance(generation.num_inference_steps, generation.guidance_scale)
        install_extras(run.preset.extras, pipe, {"transformer": pipe.transformer}, guidance, run.device)
        console.print(describe(layout, order))
        begun = time.perf_counter()
        video = pipe.generate(
            [prompts[index] for index in order],
            generation.negative_prompt,
            height=generation.height,
            width=generation.width,
            tile=layout.tile,
            overlap=layout.overlap,
            transitions=layout.transitions,
            num_inference_steps=generation.num_inference_steps,
            guidance_scale=generation.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(run.seed),
            output_type="np",
        )[0][:frames]
        took = time.perf_counter() - begun
        check_frames(video)
        file.write(video, generation.fps)
    content = {
        "prompts": [prompts[index] for index in order],
        "layout": asdict(layout),
        "seed": run.seed,
        "model": run.model or run.preset.repository,
        "preset": run.preset.model_dump(mode="json"),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "times": {"total": took},
    }
    write_json(path, {**content, **pipe.report.to_dict()})
    console.print(pipe.report.summary(), markup=False)
    console.print(f"{len(video) / generation.fps:.1f} s of video in {took:.1f} s")
    console.print(f"video: {target}\nreport: {path}", markup=False)
