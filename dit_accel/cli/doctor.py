"""`dit-accel doctor`: what this machine can run."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from dit_accel.cli.app import console


def doctor(
    test: Annotated[bool, typer.Option("--test/--no-test", help="Run the self-test of every usable backend.")] = True,
    family: Annotated[str | None, typer.Option(help="Only the presets of this family.")] = None,
) -> None:
    """Say what this machine can run, which backend each preset would use and why, and what to install.

    Leaves with 1 when a backend computes wrong results here, or a version is known to break.
    """
    from dit_accel.doctor import backend_choices, backend_findings, installs, known_to_break
    from dit_accel.report import environment

    for name, value in environment().items():
        console.print(f"{name}: {value}", markup=False)
    faults = list(known_to_break())
    for finding in backend_findings(test):
        console.print(f"backend {finding.name}: {finding.text}", markup=False)
        faults += [f"backend {finding.name} {fault}" for fault in finding.faults]
    table = Table("preset", "method", "backend", "why")
    for choice in backend_choices(family):
        table.add_row(choice.preset, choice.method, choice.backend, choice.why)
    console.print(table)
    for line in installs():
        console.print(f"to install: {line}", markup=False)
    for fault in faults:
        console.print(f"fault: {fault}", markup=False)
    console.print("no fault found" if not faults else f"{len(faults)} found", markup=False)
    if faults:
        raise typer.Exit(1)
