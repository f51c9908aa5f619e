"""Pictures of what a small model makes of held-out captions while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from diffusers import WanPipeline

from dit_accel.samples.tiny_wan_recipes import Recipe
from dit_accel.samples.tiny_wan_run import Place

_STEPS, _GUIDANCE = 20, 4.0
_SHOWN = 6  # frames of a clip
_ZOOM = 2
_LINE = 14  # pixels of a caption's line


def generate_clips(
    pipe: WanPipeline,
    prompts: Sequence[str],
    size: tuple[int, int, int],
    seeds: Sequence[int],
    steps: int = _STEPS,
    guidance: float = _GUIDANCE,
) -> list[np.ndarray]:
    """Clips of several prompts in one call of the pipeline, each from its own seed.

    Args:
        pipe: on any device.
        prompts: B of them.
        size: frames, height and width.
        seeds: one per prompt; noise is drawn on the processor, so that a seed means the same on every machine.
        steps: of denoising.
        guidance: scale.

    Returns:
        uint8 `[T, H, W, 3]` per prompt.
    """
    frames, height, width = size
    made = pipe(
        list(prompts),
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        output_type="np",
    ).frames
    return list(np.round(made * 255).astype(np.uint8))


def contact_sheet(clips: Sequence[np.ndarray], captions: Sequence[str]) -> np.ndarray:
    """One row per clip: some of its frames under its caption, uint8 `[H, W, 3]`."""
    rows = []
    for clip, text in zip(clips, captions, strict=True):
        chosen = clip[np.linspace(0, len(clip) - 1, _SHOWN).round().astype(int)]
        strip = np.concatenate(list(chosen), axis=1).repeat(_ZOOM, 0).repeat(_ZOOM, 1)
        line = np.full((_LINE, strip.shape[1], 3), 255, np.uint8)
        cv2.putText(line, text, (2, _LINE - 4), cv2.FONT_HERSHEY_SIMPLEX, 0.32, (0, 0, 0), 1, cv2.LINE_AA)
        rows += [line, strip]
    return np.concatenate(rows)


def show_samples(folder: Path, place: Place, recipe: Recipe, seed: int, step: int) -> Path:
    """Write `samples_<step>.png` in the work folder: what the pipeline of `folder` makes of held-out captions."""
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32).to(place.device)
    pipe.set_progress_bar_config(disable=True)
    canvas, shown = recipe.flow.canvas, recipe.flow.shown
    drawn = islice(recipe.repertoire.batches(seed, canvas, 1, held_out=True), shown)
    captions = [text for batch in drawn for text in batch.captions]
    with place.precision():
        size = (canvas.frames, canvas.height, canvas.width)
        made = generate_clips(pipe, captions, size, range(shown))
    path = place.work / f"samples_{step:05}.png"
    cv2.imwrite(str(path), cv2.cvtColor(contact_sheet(made, captions), cv2.COLOR_RGB2BGR))
    return path
