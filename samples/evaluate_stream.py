"""Does a stream keep what it began with? `python samples/evaluate_stream.py --num-prompts 16 --marks 8 30 100`.

Prompts are combinations that were held out of training. OpenCV says colour and shape of the object in every chunk, and
they are compared with those of the first. `--compare-memory` streams the same prompts once more with a window that is
one chunk shorter, whose memory holds a compressed past instead.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.report.records import environment
from dit_accel.samples.held_out import Task, held_out_tasks
from dit_accel.samples.judge import describe
from dit_accel.samples.repertoire import BASIC, REPERTOIRES, repertoire_of
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.scenes.judge import things_of
from dit_accel.samples.team import Team, run_team
from dit_accel.streaming import StreamSettings

IDENTITY = ("color", "shape")


@dataclass
class Variant:
    """One way to stream, and what was found of it.

    Args:
        name: for the table.
        settings: of the stream.
        policy: attention to what a chunk sees. Default: what the settings name.
        look: what a chunk (uint8 `[T, H, W, 3]`) shows. Default: one object of the basic repertoire.
        found: per prompt and chunk, what `look` says.
        cache_bytes: of all branches, after the last chunk.
        seconds: per chunk, denoised and decoded.
    """

    name: str
    settings: StreamSettings
    policy: Callable[[], DenseContext] | None = None
    look: Callable[[np.ndarray], dict[str, str]] = describe
    found: list[list[dict[str, str]]] = field(default_factory=list)
    cache_bytes: int = 0
    seconds: list[float] = field(default_factory=list)

    def watch(self, pipe: StreamingWanPipeline, prompt: str, seed: int, chunks: int) -> list[dict[str, str]]:
        """Stream a prompt, and say of each chunk what it shows."""
        stream = pipe.stream(prompt, seed=seed, num_chunks=chunks, settings=self.settings, policy=self.policy)
        shown = []
        for chunk in stream:
            shown.append(self.look(np.round(chunk.frames * 255).astype(np.uint8)))
            self.seconds.append(chunk.denoise + chunk.decode)
        self.cache_bytes = stream.driver.bytes
        self.found.append(shown)
        return shown

    def row(self, tasks: Sequence[Task], marks: Sequence[int]) -> list[str]:
        """Cells of the table: what the first chunk follows, and what is kept at each mark (see `kept`)."""
        pairs = list(zip(self.found, tasks, strict=True))
        cells = [share([shown[0][name] == getattr(task, name) for shown, task in pairs]) for name in IDENTITY]
        for mark in marks:
            for names in (IDENTITY, *((name,) for name in IDENTITY)):
                cells.append(share([kept(shown, mark, names) for shown in self.found]))
        return [self.name, f"{self.cache_bytes / 2**20:.2f}", f"{np.median(self.seconds):.1f}", *cells]


def kept(found: Sequence[dict[str, str]], mark: int, names: Sequence[str] = IDENTITY) -> bool:
    """Whether the stream still shows what its first chunk shows.

    Args:
        found: what `Variant.look` says of each chunk.
        mark: up to 8, all of the first `mark` chunks must agree; beyond, more than half of the last 8 up to it.
        names: criteria that must agree.

    Returns:
        False also where the first chunk shows no object.
    """
    first, agree = found[0], [all(chunk[name] == found[0][name] for name in names) for chunk in found[:mark]]
    if any(first[name] == "none" for name in names):
        return False
    return all(agree) if mark <= 8 else sum(agree[-8:]) > 4


def share(values: Sequence[bool]) -> str:
    """For the table."""
    return f"{sum(values)}/{len(values)}"


def with_compressed_past(
    settings: StreamSettings, transformer: Any, grid: tuple[int, int], tile: tuple[int, int]
) -> Variant:
    """A window shorter by one chunk, whose keys and values make room for a compressed past.

    Args:
        settings: of the stream with the whole window.
        transformer: says heads and their size.
        grid: (height, width) of a frame in tokens.
        tile: tokens of a block of the past.

    Raises:
        ValueError: the stream has no window, or one that holds nothing but the sink and a chunk.
    """
    if settings.window is None or settings.window - 2 * settings.chunk < settings.sink:
        raise ValueError(f"expected a window that can be {settings.chunk} frames shorter, got {settings.window}")
    heads, dim = transformer.config.num_attention_heads, transformer.config.attention_head_dim
    frame = torch.zeros(1, grid[0] * grid[1], heads, dim, dtype=transformer.dtype)
    one = CompressedMemory(tile)
    one.evict(0, 0, frame, frame, grid)
    entries = settings.chunk * 2 * frame.numel() * frame.element_size() // one.bytes
    shorter = settings.model_copy(update={"window": settings.window - settings.chunk})
    name = f"sink {shorter.sink}, window {shorter.window}, past of {entries} entries"
    return Variant(name, shorter, lambda: CompressedMemory(tile, entries))


def table(variants: Sequence[Variant], tasks: Sequence[Task], marks: Sequence[int]) -> list[str]:
    """Lines of Markdown."""
    head = ["stream", "MiB", "s per chunk", "first: colour", "first: shape"]
    for mark in marks:
        head += [f"{what} at {mark}" for what in ("both", "colour", "shape")]
    rows = [variant.row(tasks, marks) for variant in variants]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]


def make_variants(
    pipe: Any, arguments: argparse.Namespace, look: Callable[[np.ndarray], dict[str, str]]
) -> list[Variant]:
    """The stream of the preset with what the options change, and the one of equal memory if they ask for it."""
    settings: StreamSettings = pipe.stream_settings
    if arguments.levels is not None:
        settings = settings.model_copy(update={"steps": tuple(arguments.levels)})
    variants = [Variant(f"sink {settings.sink}, window {settings.window}", settings, look=look)]
    if arguments.compare_memory:
        size = pipe.preset.generation
        grid = pipe._latent_size(size.height, size.width)
        patch = pipe.transformer.config.patch_size
        tokens = (grid[0] // patch[1], grid[1] // patch[2])
        tile = (arguments.tile, arguments.tile)
        variants.append(replace(with_compressed_past(settings, pipe.transformer, tokens, tile), look=look))
    return variants


def watch_all(team: Team, arguments: argparse.Namespace) -> tuple[list[Variant], list[Task]]:
    """Stream all prompts, this process every so many-th of them; what all processes found, and the prompts."""
    guided = {} if arguments.guidance_scale is None else {"guidance_scale": arguments.guidance_scale}
    pipe = StreamingWanPipeline.from_preset(arguments.preset, arguments.model, **guided)
    repertoire = REPERTOIRES[arguments.repertoire] if arguments.repertoire else repertoire_of(pipe.tokenizer)
    variants = make_variants(pipe, arguments, describe if repertoire == BASIC else things_of)
    size = pipe.preset.generation
    canvas = Canvas(size.num_frames, size.height, size.width, endless=True)
    tasks = held_out_tasks(repertoire, arguments.num_prompts, canvas, arguments.seed + 99)
    numbers = range(team.rank, len(tasks), team.size)
    for number in numbers:
        for variant in variants:
            shown = variant.watch(pipe, tasks[number].text, arguments.seed + number, max(arguments.marks))
            seen = [f"{chunk['color']} {chunk['shape']}" for chunk in shown]
            print(f"{tasks[number].text} | {variant.name} | {', '.join(seen)}", flush=True)
    for variant in variants:
        found = team.collect(dict(zip(numbers, variant.found, strict=True)))
        variant.found = [found[number] for number in range(len(tasks))]
    return variants, tasks


def read_options(given: Sequence[str] | None) -> argparse.Namespace:
    """Options of the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan-causal")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--repertoire", choices=REPERTOIRES, help="of the prompts; default: all that the model knows")
    parser.add_argument("--marks", type=int, nargs="+", default=[8], help="chunks after which the object is compared")
    parser.add_argument("--compare-memory", action="store_true", help="also with a compressed past in equal memory")
    parser.add_argument("--tile", type=int, default=4, help="tokens per side of a block of the compressed past")
    parser.add_argument("--guidance-scale", type=float, default=None, help="instead of the preset's")
    parser.add_argument(
        "--levels", type=float, nargs="+", default=None, help="denoising steps, instead of the preset's"
    )
    parser.add_argument("--processes", type=int, default=1, help="that stream at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="write what was found as JSON")
    arguments = parser.parse_args(given)
    if not 1 <= arguments.processes <= arguments.num_prompts:
        parser.error(f"--processes: expected 1 to {arguments.num_prompts}, one per prompt, got {arguments.processes}")
    return arguments


def main(given: Sequence[str] | None = None) -> None:
    """Stream, judge and print one table."""
    arguments = read_options(given)
    variants, tasks = run_team(arguments.processes, partial(watch_all, arguments=arguments))
    settings = variants[0].settings
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    steps = f"{len(settings.steps)} steps ({settings.sampler}), guidance {settings.guidance_scale:g}"
    print(f"preset {arguments.preset}, chunks of {settings.chunk} latent frames, {steps}")
    print("\n".join(table(variants, tasks, sorted(arguments.marks))))
    if arguments.output is not None:
        rows = {variant.name: variant.found for variant in variants}
        arguments.output.write_text(json.dumps({"environment": environment(), "found": rows}, indent=1))


if __name__ == "__main__":
    main()
