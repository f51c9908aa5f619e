"""`dit-accel bench`: the group of benchmarks."""

from __future__ import annotations

import typer

bench_app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Measure speed on this machine.")
