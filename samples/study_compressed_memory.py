"""Does a compressed past help? `python samples/study_compressed_memory.py --frames 61`.

Queries, keys and values are captured from a causal pass of a model over a drawn clip. Attention of the last chunk over
the whole past is the truth; it is compared with a sink and a window alone, with a larger window of the same memory, and
with the same sink and window joined by the compressed past. What becomes of colour and shape in a long stream is for
`python samples/evaluate_stream.py --compare-memory` to say.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_accel.models import load_pipeline
from dit_accel.pipelines.streaming import CausalWan, StreamingWanPipeline
from dit_accel.pipelines.streaming.attention import AttentionCall, DenseContext
from dit_accel.pipelines.streaming.decoder import LatentScale
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.report.records import environment
from dit_accel.samples.clips import captioned_clips
from dit_accel.streaming import StreamSettings

CHUNK, SINK = 2, 2
MEMORIES: dict[str, dict[str, Any]] = {
    "mean": {"variance": False, "cross": False},
    "mean + variance": {"variance": True, "cross": False},
    "mean + variance + cross": {"variance": True, "cross": True},
}


class Capture(DenseContext):
    """Keeps the queries, keys and values of the last call of every layer."""

    def __init__(self) -> None:
        self.calls: dict[int, tuple[AttentionCall, Tensor, Tensor, Tensor]] = {}

    def attend(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q `[B, N, H, D]` over k, v `[B, M, H, D]`."""
        self.calls[call.layer] = (call, q, k, v)
        return super().attend(call, q, k, v)


def capture(pipe: StreamingWanPipeline, seed: int, frames: int, size: int, timestep: float) -> Capture:
    """Run a drawn clip through the model chunk by chunk, clean but for the last chunk, with everything visible."""
    clip, words, _ = next(captioned_clips(seed, 1 + 2 * (frames - 1), size, size))
    video = torch.from_numpy(clip).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        latents = LatentScale(pipe.vae).from_vae(pipe.vae.encode(video).latent_dist.mode())
    policy = Capture()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    with CausalWan(pipe.transformer) as runtime:
        branch = runtime.branch(StreamSettings(chunk=CHUNK, window=None), pipe._encode(words), lambda: policy)
        last = (latents.shape[2] - 1) // CHUNK * CHUNK
        for start in range(0, last, CHUNK):
            runtime.forward(branch, latents[:, :, start : start + CHUNK], 0.0, start)
        sigma = timestep / 1000
        noisy = (1 - sigma) * latents[:, :, last:] + sigma * noise[:, :, last:]
        runtime.forward(branch, noisy, timestep, last, step=0)
    return policy


def errors(policy: Capture, window: int, tile: tuple[int, int]) -> Iterator[tuple[str, float, float]]:
    """(variant, frames of memory, relative error of the attention output), one triple per layer and variant."""
    for layer, (call, q, k, v) in policy.calls.items():
        truth = DenseContext().attend(call, q, k, v)
        for name, parameters in MEMORIES.items():
            memory = CompressedMemory(tile, entries=10**6, reach=float("inf"), **parameters)
            near = windowed(call, k, v, window)
            for place, frame in enumerate(call.frames):
                if frame not in near[0].frames:
                    part = slice(place * call.frame_tokens, (place + 1) * call.frame_tokens)
                    raw = call.rotary.time(k[:, part], [-call.positions[place]])
                    memory.evict(layer, frame, raw, v[:, part], call.grid)
            frame_bytes = k.element_size() * (k[:, : call.frame_tokens].numel() + v[:, : call.frame_tokens].numel())
            extra = memory.bytes / frame_bytes
            yield name, window + extra, error(memory.attend(near[0], q, *near[1:]), truth)
            larger = windowed(call, k, v, window + round(extra))
            yield (
                f"larger window for {name!r}",
                window + round(extra),
                error(DenseContext().attend(larger[0], q, *larger[1:]), truth),
            )
        yield "sink and window", window, error(DenseContext().attend(near[0], q, *near[1:]), truth)


def windowed(call: AttentionCall, k: Tensor, v: Tensor, window: int) -> tuple[AttentionCall, Tensor, Tensor]:
    """The call with the sink and the last frames alone, `window` in all."""
    keep = [f for f in call.frames if f < SINK or f >= call.own.stop - (window - SINK)]
    places = [call.frames.index(frame) for frame in keep]
    k, v = (x.unflatten(1, (len(call.frames), -1))[:, places].flatten(1, 2) for x in (k, v))
    positions = tuple(call.positions[place] for place in places)
    near = AttentionCall(call.layer, call.step, call.own, tuple(keep), positions, call.grid, call.rotary)
    return near, k, v


def error(out: Tensor, truth: Tensor) -> float:
    """Relative L2 error."""
    return float((out - truth).norm() / truth.norm())


def main() -> None:
    """Print and save the study."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="samples/tiny-wan", help="pipeline folder")
    parser.add_argument("--frames", type=int, default=61, help="latent frames of the clip")
    parser.add_argument("--size", type=int, default=64, help="pixels")
    parser.add_argument("--window", type=int, default=10, help="frames of the window, sink included")
    parser.add_argument("--tile", type=int, default=4, help="tokens per side of a block")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.model, pipeline_class=StreamingWanPipeline)
    found: dict[str, list[tuple[float, float]]] = {}
    for timestep in (1.0, 500.0, 900.0):
        for seed in range(arguments.clips):
            policy = capture(pipe, seed, arguments.frames, arguments.size, timestep)
            for name, memory, value in errors(policy, arguments.window, (arguments.tile, arguments.tile)):
                found.setdefault(f"t={timestep:g} {name}", []).append((memory, value))
    table = {
        name: {"frames_of_memory": np.mean([m for m, _ in x]), "error": np.mean([e for _, e in x])}
        for name, x in found.items()
    }
    for name, row in table.items():
        print(f"{name:45s} {row['frames_of_memory']:6.1f} frames  error {row['error']:.4f}")
    if arguments.output:
        content = {"arguments": {k: str(x) for k, x in vars(arguments).items()}, "attention": table}
        arguments.output.write_text(json.dumps({**content, "environment": environment()}, indent=1))


if __name__ == "__main__":
    main()
