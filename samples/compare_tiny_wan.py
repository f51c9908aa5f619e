"""Compare a preset with dense on the small model: `python samples/compare_tiny_wan.py`.

Every prompt is generated dense and accelerated from the same seed, in turn, in one process. Needs the `metrics` extra.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

import dit_accel
from dit_accel.cli.running import call_pipeline
from dit_accel.models import load_pipeline
from dit_accel.report import environment
from dit_accel.video_io import OutputFile

PROMPTS = (
    "a red ball moving right",
    "a blue square moving down on a white background",
    "a yellow star moving left on a navy background",
    "a green triangle moving up on a gray background",
)


def psnr_and_ssim(clip: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """PSNR in dB over the whole clip, and mean SSIM of its frames; both `[T, H, W, 3]` in [0, 1]."""
    frames = zip(clip, reference, strict=True)
    similar = [structural_similarity(a, b, channel_axis=-1, data_range=1.0) for a, b in frames]
    return float(peak_signal_noise_ratio(reference, clip, data_range=1.0)), statistics.mean(similar)


def main() -> None:
    """Print one row per prompt and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--prompts", nargs="+", default=list(PROMPTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=None, help="folder for the videos of both")
    arguments = parser.parse_args()
    preset = dit_accel.load_preset(arguments.preset)
    pipe = load_pipeline(arguments.model or preset.repository)
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    print(f"preset {preset.name}: {preset.method.name} {preset.method.parameters}, {preset.generation}")
    print("| prompt | dense s | accelerated s | ratio | density | PSNR dB | SSIM |\n|---|---|---|---|---|---|---|")
    rows = []
    for number, prompt in enumerate(arguments.prompts):
        seed = arguments.seed + number
        reference, dense = call_pipeline(pipe, preset.generation, prompt, seed)
        with dit_accel.accelerate(pipe, preset) as acceleration:
            clip, fast = call_pipeline(pipe, preset.generation, prompt, seed)
            density = acceleration.report().density
        if arguments.save is not None:
            for name, frames in (("dense", reference), ("accelerated", clip)):
                with OutputFile(arguments.save / f"{number}-{name}.mp4") as file:
                    file.write(frames, preset.generation.fps)
        ratio = dense["denoise"] / fast["denoise"]
        rows.append((dense["denoise"], fast["denoise"], ratio, density, *psnr_and_ssim(clip, reference)))
        print(_row(prompt, rows[-1]), flush=True)
    print(_row("median", tuple(statistics.median(column) for column in zip(*rows, strict=True))))


def _row(name: str, values: tuple[float, ...]) -> str:
    dense, fast, ratio, density, psnr, ssim = values
    return f"| {name} | {dense:.1f} | {fast:.1f} | {ratio:.2f}x | {density:.3f} | {psnr:.1f} | {ssim:.3f} |"


if __name__ == "__main__":
    main()
