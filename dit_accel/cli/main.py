"""`dit-accel`: the commands around generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.app import console, run_app, version_option
from dit_accel.cli.bench import bench_app
from dit_accel.cli.bench_all import bench_all
from dit_accel.cli.calibrate import calibrate
from dit_accel.cli.compare import compare
from dit_accel.cli.demo import demo
from dit_accel.cli.doctor import doctor
from dit_accel.cli.methods import methods_app
from dit_accel.cli.report import report

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None, no_args_is_help=True)
presets_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="List the presets, or show one.")
app.add_typer(presets_app, name="presets")
app.add_typer(methods_app, name="methods")
app.command()(demo)
app.add_typer(bench_app, name="bench")
bench_app.command("all")(bench_all)
app.command()(doctor)
app.command()(report)
app.command()(compare)
app.command()(calibrate)


@app.callback()
def root(version: Annotated[bool, typer.Option("--version", callback=version_option, is_eager=True)] = False) -> None:
    """Training-free acceleration of the diffusion transformers in Diffusers."""


@presets_app.callback()
def presets(
    context: typer.Context,
    family: Annotated[str | None, typer.Option(help="Only those of this family.")] = None,
    device: Annotated[str, typer.Option(help="Predict the gain for auto, cpu or cuda.")] = "auto",
) -> None:
    """List the presets with their size, method, density, attention share and predicted gain."""
    if context.invoked_subcommand:
        return
    from dit_accel.cli.showing import presets_table
    from dit_accel.estimate import machine_here

    console.print(presets_table(family, machine_here(device)))


@presets_app.command("show")
def show_preset(
    name: str, export: Annotated[Path | None, typer.Option(help="Write the YAML to this file.")] = None
) -> None:
    """Print a resolved preset as YAML."""
    from dit_accel.presets import load_preset

    text = load_preset(name).to_yaml()
    if export is None:
        console.print(text, markup=False, end="")
    else:
        export.write_text(text, encoding="utf-8")
        console.print(f"written: {export}", markup=False)


def main() -> None:
    """Entry point of `dit-accel`."""
    run_app(app, "dit-accel")
