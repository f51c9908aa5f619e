"""Speed, latency and memory of streams: `python samples/bench_streaming.py --chunks 8`.

By default the small model that ships streams on this machine; `--random-1.3b` streams a transformer of that size with
random weights at 832 x 480 in latent space (no text encoder or autoencoder is loaded), which needs a GPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from rich.console import Console
from rich.table import Table

from dit_accel.methods.registry import get_method
from dit_accel.models import load_pipeline
from dit_accel.pipelines.streaming import CausalWan, StreamingWanPipeline, VideoStream
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.planned import PlannedContext
from dit_accel.pipelines.streaming.rolling import make_driver
from dit_accel.report.records import environment
from dit_accel.streaming import StreamSettings

_STEPS = (1000.0, 750.0, 500.0, 250.0)
_ROLLING = {"rolling": True, "positions": "sink_adjacent"}
VARIANTS: dict[str, tuple[dict[str, Any], Callable[[], DenseContext]]] = {
    "window 21": ({"window": 21}, DenseContext),
    "sink 3, window 12": ({"window": 12, "sink": 3}, DenseContext),
    "sink 3, window 12, reindexed": ({"window": 12, "sink": 3, "positions": "reindex"}, DenseContext),
    "sink 3, window 12, compressed past": (
        {"window": 12, "sink": 3, "positions": "reindex"},
        lambda: CompressedMemory(entries=32),
    ),
    "rolling, sink 3, window 21": ({"window": 21, "sink": 3, **_ROLLING}, DenseContext),
    "window 21, stored past": ({"window": 21}, lambda: FlashBlock({0, 1}, ())),
    "window 21, growing sparsity": ({"window": 21}, lambda: LightForcing(0.9, 0.8)),
    "window 21, composed 0.25": ({"window": 21}, lambda: PlannedContext(get_method("composed", density=0.25))),
}


def random_stream(
    size: tuple[int, int], settings: StreamSettings, policy: Callable[[], DenseContext], chunks: int
) -> Any:
    """A driver over random weights of the 1.3B size, bf16 on the GPU, for latents of `size`."""
    with torch.device("cuda"):
        model = WanTransformer3DModel(
            num_attention_heads=12, attention_head_dim=128, text_dim=4096, ffn_dim=8960, num_layers=30
        )
    text = torch.randn(1, 512, 4096)
    return make_driver(CausalWan(model.to(torch.bfloat16).eval()), settings, text, size, policy=policy, chunks=chunks)


def peak_memory(device: str) -> int:
    """Bytes: of the GPU since the last reset, or of the process so far."""
    if device == "cuda":
        return int(torch.cuda.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def measure(stream: VideoStream, device: str, begun: float, factor: int) -> dict[str, Any]:
    """Times of a stream; the first chunk, which warms up, counts for the latency alone.

    Args:
        stream: with frames, or of latents only.
        device: "cpu" or "cuda".
        begun: when it was asked for.
        factor: pixel frames per latent frame, where there are no frames to count.
    """
    latency, denoise, decode, frames = 0.0, 0.0, 0.0, 0
    for chunk in stream:
        if not chunk.index:
            latency = time.perf_counter() - begun
            continue
        denoise, decode = denoise + chunk.denoise, decode + chunk.decode
        frames += factor * len(chunk.latent_frames) if chunk.frames is None else len(chunk.frames)
    return {
        "denoise_fps": frames / denoise,
        "end_to_end_fps": frames / (denoise + decode),
        "first_frame_latency_s": latency,
        "cache_mib": stream.cache_bytes / 2**20,
        "peak_memory_mib": peak_memory(device) / 2**20,
    }


def main() -> None:
    """Print and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="samples/tiny-wan-causal")
    parser.add_argument("--chunks", type=int, default=10)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), help="height and width in pixels")
    parser.add_argument("--random-1.3b", dest="random", action="store_true")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.random and device == "cpu":
        parser.error("--random-1.3b needs a GPU; none was found")
    pipe = None if arguments.random else load_pipeline(arguments.model, pipeline_class=StreamingWanPipeline)
    rows = {}
    for name in arguments.variants:
        changes, policy = VARIANTS[name]
        settings = StreamSettings(steps=_STEPS, **changes)
        if device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        if pipe is None:
            driver = random_stream((60, 104), settings, policy, arguments.chunks)
            begun, stream = time.perf_counter(), VideoStream(driver, None, lambda text: torch.empty(0), "latent")
        else:
            size = {"height": arguments.size[0], "width": arguments.size[1]}
            begun = time.perf_counter()
            stream = pipe.stream(
                "a red ball moving right",
                settings=settings,
                num_chunks=arguments.chunks,
                policy=policy,
                overlap=False,
                **size,
            )
        rows[name] = measure(stream, device, begun, 4)
    show(rows)
    if arguments.output:
        content = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "rows": rows}
        arguments.output.write_text(json.dumps({**content, "environment": environment()}, indent=1))


def show(rows: dict[str, dict[str, Any]]) -> None:
    """Print one line per variant."""
    table = Table("variant", *next(iter(rows.values())))
    for name, row in rows.items():
        table.add_row(name, *(f"{value:.2f}" for value in row.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
