"""`dit-accel bench`: the group of benchmarks."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dit_accel.cli.app import console

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed on this machine.")


def command_line() -> str:
    """The command as typed, for the column that says how a result was made."""
    return shlex.join(["dit-accel", *sys.argv[1:]])


@bench_app.command("attention")
def attention(
    shapes: Annotated[list[str] | None, typer.Option(help="Shapes: presets, or those of --list-shapes.")] = None,
    methods: Annotated[
        list[str] | None, typer.Option(help="Methods, presets for theirs, or random_blocks. Default: all.")
    ] = None,
    densities: Annotated[
        list[float] | None, typer.Option(help="Densities of the sweep. Default: the method's.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    heads: Annotated[int | None, typer.Option(help="Heads to time. Default: the model's.", min=1)] = None,
    limit: Annotated[float, typer.Option(help="Longest dense call in seconds; heads are left out to keep it.")] = 60.0,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of the inputs.", min=0)] = 0,
    csv: Annotated[Path | None, typer.Option(help="File for the results, written row by row.")] = None,
    show_shapes: Annotated[bool, typer.Option("--list-shapes", help="List the shapes and leave.")] = False,
) -> None:
    """Time methods against the fastest dense attention found here; each is verified on a small case first.

    `random_blocks` times the kernel alone. A static plan is made once for all layers and steps, so selecting it counts
    in `select_first_ms` alone.
    """
    import torch

    from dit_accel.bench.attention import measure, variants
    from dit_accel.bench.options import Options
    from dit_accel.bench.shapes import find_shape, list_shapes
    from dit_accel.bench.table import stamp, stream_csv
    from dit_accel.methods.registry import list_methods
    from dit_accel.models import resolve_device

    if show_shapes:
        for shape in map(find_shape, list_shapes()):
            console.print(f"{shape.name}: {shape.of}; {shape.layout.tokens} tokens, {shape.heads} heads", markup=False)
        return
    chosen = [find_shape(name) for name in shapes or ["cpu-1k", "cpu-4k"]]
    names = methods or [name for name in list_methods() if name != "dense"] + ["random_blocks"]
    cases = variants(names, densities or [])
    where, kind = resolve_device(device, dtype)
    options = Options(torch.device(where), kind, rounds, heads, limit, backend, seed)
    rows = (row.to_dict() for shape in chosen for row in measure(shape, cases, options))
    for row in stream_csv(csv, rows, {**stamp(), "command": command_line()}):
        console.print(attention_line(row), markup=False)
    if csv is not None:
        console.print(f"written: {csv}", markup=False)


@bench_app.command("kernels")
def kernels(
    shapes: Annotated[
        list[str] | None,
        typer.Option(help="See `bench attention --list-shapes`. Default: those of models on a GPU, else cpu-1k."),
    ] = None,
    variants: Annotated[
        list[str] | None,
        typer.Option(help="exact, order0, diagonal, global, grouped, about, mixed, int8, int8_fp8. Default: all."),
    ] = None,
    densities: Annotated[list[float] | None, typer.Option(help="Densities. Default: 5 to 100 %.")] = None,
    q_block: Annotated[int, typer.Option(help="Tokens per query block.", min=1)] = 128,
    k_block: Annotated[int, typer.Option(help="Tokens per key block.", min=1)] = 64,
    pattern: Annotated[str, typer.Option(help="random, or window: the nearest blocks.")] = "random",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 5,
    heads: Annotated[int | None, typer.Option(help="Heads to time. Default: the model's.", min=1)] = None,
    limit: Annotated[float, typer.Option(help="Longest dense call in seconds; heads are left out to keep it.")] = 60.0,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    seed: Annotated[int, typer.Option(help="Seed of inputs and plans.", min=0)] = 0,
    max_minutes: Annotated[
        float | None, typer.Option(help="Begin nothing after so many minutes; what is left out is said.", min=0)
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="File for the results, written row by row.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="File for a table of the results, written likewise.")] = None,
) -> None:
    """Time block attention alone against the fastest dense attention, after a numerical check of each variant."""
    import torch

    from dit_accel.bench.kernels import DENSITIES, MARKDOWN, find_pattern, find_variants, measure_kernels
    from dit_accel.bench.options import Options
    from dit_accel.bench.shapes import MODEL_SHAPES, find_shape
    from dit_accel.bench.table import stamp, stream_csv, stream_markdown
    from dit_accel.models import resolve_device

    where, kind = resolve_device(device, dtype)
    usual = list(MODEL_SHAPES) if torch.device(where).type == "cuda" else ["cpu-1k"]
    chosen, names = [find_shape(name) for name in shapes or usual], find_variants(variants or [])
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    options = Options(torch.device(where), kind, rounds, heads, limit, backend, seed, deadline)
    rows = (
        vars(row)
        for shape in chosen
        for row in measure_kernels(
            shape, densities or DENSITIES, names, options, (q_block, k_block), find_pattern(pattern)
        )
    )
    common = {**stamp(), "command": command_line()}
    for row in stream_markdown(markdown, stream_csv(csv, rows, common), MARKDOWN, common):
        console.print(kernel_line(row), markup=False)
    for path in (csv, markdown):
        if path is not None:
            console.print(f"written: {path}", markup=False)


def kernel_line(row: Mapping[str, Any]) -> str:
    """One row of `bench kernels` for people."""
    head = f"{row['shape']} {row['variant']} {row['requested_density']:.0%} of {row['heads']} heads"
    if row["attend_ms"] is None:
        return f"{head}: {row['note']}"
    extra = "" if row["extra"] is None else f", {row['extra']:+.0%} over exact"
    return (
        f"{head}: {row['backend']} {row['attend_ms']:.2f} ms, {row['dense_backend']} {row['dense_ms']:.2f} ms, "
        f"{row['ratio']:.2f}x, {row['rate']:.3g} of {row['dense_rate']:.3g} TFLOP/s per selected pair{extra}"
    )


@bench_app.command("step")
def step(
    preset: Annotated[str, typer.Option(help="Preset that gives the model's sizes.")] = "tiny-wan",
    layers: Annotated[int | None, typer.Option(help="Blocks. Default: all, or as many as fit.", min=1)] = None,
    methods: Annotated[list[str] | None, typer.Option(help="Methods. Default: the preset's.")] = None,
    densities: Annotated[
        list[float] | None, typer.Option(help="Densities of the sweep. Default: the method's.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.", min=1)] = 3,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    csv: Annotated[Path | None, typer.Option(help="File for the results, written row by row.")] = None,
) -> None:
    """Time one forward pass of a whole transformer with random weights, dense and accelerated in turn."""
    import torch

    from dit_accel.bench.attention import variants
    from dit_accel.bench.step import build, measure_step
    from dit_accel.bench.table import stamp, stream_csv
    from dit_accel.methods.registry import get_method
    from dit_accel.models import resolve_device
    from dit_accel.presets import load_preset

    resolved = load_preset(preset)
    own = [get_method(resolved.method.name, **resolved.method.parameters)]
    cases = variants(methods, densities or []) if methods else own
    where, kind = resolve_device(device, dtype)
    built = build(resolved, layers, torch.device(where), kind)
    console.print(f"{resolved.name}: {built.layers} of {built.published_layers} blocks, random weights", markup=False)
    rows = measure_step(resolved, built, cases, rounds, backend)
    for row in stream_csv(csv, rows, {**stamp(), "command": command_line()}):
        console.print(step_line(row), markup=False)
    if csv is not None:
        console.print(f"written: {csv}", markup=False)


def step_line(row: Mapping[str, Any]) -> str:
    """One row of `bench step` for people."""
    head = f"{row['model']} {row['method'] or ''} {row['parameters'] or ''}".rstrip()
    if row["ratio"] is None:
        return f"{head}: {row['note']}"
    return (
        f"{head}: {row['ratio']:.2f}x dense [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}], {row['dense_s']:.2f} s "
        f"dense, {row['method_s']:.2f} s, density {row['density']:.3f}"
    )


def attention_line(row: Mapping[str, Any]) -> str:
    """One row of `bench attention` for people."""
    head = f"{row['shape']} {row['method']} {row['parameters']}"
    if row["ratio"] is None:
        return f"{head}: {row['note']}"
    note = f" ({row['note']})" if row["note"] else ""
    spent = ", ".join(f"{part} {row[f'{part}_ms']:.1f}" for part in ("dense", "order", "select", "attend"))
    return (
        f"{head}: {row['ratio']:.2f}x dense [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}] at density "
        f"{row['density']:.3f}; ms: {spent} (first select {row['select_first_ms']:.1f}); {row['backend']}{note}"
    )
