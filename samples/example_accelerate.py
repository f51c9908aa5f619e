"""The same clip dense and accelerated, and how far apart they are: `python samples/example_accelerate.py`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

import dit_accel
from dit_accel.metrics import check_metrics, closeness
from dit_accel.models import shipped_model
from dit_accel.video.files import OutputFile


def main(arguments: Sequence[str] | None = None) -> None:
    """Generate twice with one seed, print times and closeness, write the accelerated clip."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompt", default="a red ball moving right")
    parser.add_argument("--preset", default="tiny-wan")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, default=Path("outputs/example.mp4"))
    options = parser.parse_args(arguments)
    check_metrics()
    size = {"height": options.size, "width": options.size, "num_frames": options.frames}
    call = {"prompt": options.prompt, "num_inference_steps": options.steps, "output_type": "np", **size}
    with OutputFile(options.output) as file:
        pipe = WanPipeline.from_pretrained(shipped_model("tiny-wan"))
        dense, dense_seconds = _generate(pipe, call)
        with dit_accel.accelerate(pipe, preset=options.preset) as acceleration:
            fast, seconds = _generate(pipe, call)
            print(acceleration.summary())
        near = closeness(fast, dense)
        file.write(fast, 12)
    print(f"dense {dense_seconds:.1f} s, accelerated {seconds:.1f} s, PSNR {near.psnr:.1f} dB, SSIM {near.ssim:.3f}")
    print(f"video: {options.output}")


def _generate(pipe: Any, call: dict[str, Any]) -> tuple[np.ndarray, float]:
    """Frames `[T, H, W, 3]` in [0, 1], and seconds."""
    begun = time.perf_counter()
    frames = pipe(generator=torch.Generator("cpu").manual_seed(0), **call).frames[0]
    return frames, time.perf_counter() - begun


if __name__ == "__main__":
    main()
