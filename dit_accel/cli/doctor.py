"""`dit-accel doctor`: what this machine can run."""

from __future__ import annotations

from collections import defaultdict
from typing import Annotated

import typer

from dit_accel.cli.app import console


def doctor(
    test: Annotated[bool, typer.Option("--test/--no-test", help="Run the self-test of every usable backend.")] = True,
    family: Annotated[str | None, typer.Option(help="Only the presets of this family.")] = None,
    every: Annotated[
        bool, typer.Option("--all", help="All variants of the presets, not only the recommended.")
    ] = False,
) -> None:
    """Say what this machine can run, which backend each preset would use and why, and what to install.

    Leaves with 1 when a backend computes wrong results here, or a version is known to break.
    """
    from dit_accel.doctor import backend_choices, backend_findings, installs, known_to_break, memory, weights
    from dit_accel.kernels.products import library
    from dit_accel.report.records import environment

    for name, value in environment().items():
        console.print(f"{name}: {value}", markup=False)
    console.print(f"memory: {memory()}", markup=False)
    console.print(f"fp32 products on the CPU: {library()}", markup=False)
    faults = list(known_to_break())
    for finding in backend_findings(test):
        console.print(f"backend {finding.name}: {finding.text}", markup=False)
        faults += [f"backend {finding.name} {fault}" for fault in finding.faults]
    groups: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for choice in backend_choices(family, every):
        groups[choice.method, choice.backend, choice.why].append(choice.preset)
    for (method, backend, why), presets in groups.items():
        console.print(f"{method} runs on {backend}, {why}: {', '.join(presets)}", markup=False)
    sizes: dict[str, list[str]] = defaultdict(list)
    for preset, told in weights(family, every):
        sizes[told].append(preset)
    for told, presets in sizes.items():
        console.print(f"weights of the transformer's blocks, {told}: {', '.join(presets)}", markup=False)
    for line in installs():
        console.print(f"to install: {line}", markup=False)
    for fault in faults:
        console.print(f"fault: {fault}", markup=False)
    console.print("no fault found" if not faults else f"{len(faults)} found", markup=False)
    if faults:
        raise typer.Exit(1)
