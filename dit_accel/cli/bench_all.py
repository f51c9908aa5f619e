"""`dit-accel bench all`: every table of speed that `docs/results` holds, by one command on any machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.app import console
from dit_accel.cli.bench import attention_line, command_line, kernel_line, step_line


def bench_all(
    output: Annotated[Path, typer.Option(help="Folder for the three CSV files.")] = Path("outputs/bench"),
    max_minutes: Annotated[
        float | None, typer.Option(help="Begin nothing after so many minutes; rows left out say so.", min=0)
    ] = None,
    backend: Annotated[str, typer.Option(help="Backend of the sparse attention.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Measure kernels, whole steps and single calls at the shapes that suit this machine; write one CSV of each.

    On a CPU it takes about eight minutes, on a GPU it measures the shapes of published models. Losses are written like
    gains, and what could not be measured says why. Use a machine that does nothing else.
    """
    import torch

    from dit_accel.bench.options import Options
    from dit_accel.bench.suite import attention_rows, kernel_rows, machine_name, step_rows, suite_for
    from dit_accel.bench.table import stamp, stream_csv
    from dit_accel.models import quiet_loading, resolve_device

    where, kind = resolve_device(device, dtype)
    suite, common = suite_for(where), {**stamp(), "command": command_line()}
    deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
    options = Options(torch.device(where), kind, suite.rounds, limit=suite.limit, backend=backend, deadline=deadline)
    quiet_loading()
    # The longest comes last, so that a limit of time cuts rows and not tables.
    tables = (
        ("kernels", kernel_rows(suite.kernels, options), kernel_line),
        ("step", step_rows(suite, options), step_line),
        ("attention", attention_rows(suite.attention, options), attention_line),
    )
    for name, rows, line in tables:
        path = output / f"{name}-{machine_name(common['device'])}.csv"
        for row in stream_csv(path, rows, common):
            console.print(f"{name}: {line(row)}", markup=False)
        console.print(f"written: {path}", markup=False)
