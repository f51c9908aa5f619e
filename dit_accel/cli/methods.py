"""`dit-accel methods`: list them, describe one, draw what it computes, and look at head tables."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.table import Table

from dit_accel.cli.app import console
from dit_accel.errors import ConfigError

methods_app = typer.Typer(invoke_without_command=True, rich_markup_mode=None, help="List the methods, or show one.")


@methods_app.callback()
def methods(context: typer.Context) -> None:
    """List the methods."""
    if context.invoked_subcommand:
        return
    from dit_accel.methods.registry import list_methods, method_class

    table = Table("method", "source", "what it does")
    for name in list_methods():
        cls = method_class(name)
        table.add_row(name, cls.source, (cls.__doc__ or "").splitlines()[0])
    console.print(table)


@methods_app.command("show")
def show_method(
    name: str,
    grid: Annotated[str | None, typer.Option(help="FRAMESxHEIGHTxWIDTH in tokens: draw the method there.")] = None,
    output: Annotated[Path | None, typer.Option(help="The picture's file. Default: NAME.png.")] = None,
    parameter: Annotated[list[str] | None, typer.Option("--parameter", "-p", help="name=value, repeatable.")] = None,
    text: Annotated[int, typer.Option(help="Text tokens before the video.", min=0)] = 0,
    query: Annotated[int | None, typer.Option(help="Token whose keys are drawn. Default: the middle one.")] = None,
    head_table: Annotated[
        Path | None, typer.Option(help="Draw the modes of a layer of this table, with NAME as the preset's method.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Layer of the table.")] = 0,
) -> None:
    """Print a method's description, parameters and defaults; with --grid, draw the blocks it computes."""
    from dit_accel.methods.registry import get_method, method_class

    cls = method_class(name)
    method = get_method(name, **parse_parameters(parameter or []))
    if grid is None:
        if output is not None or head_table is not None:
            given = "--output" if output is not None else "--head-table"
            raise ConfigError(given, "a picture needs a grid, for example --grid 21x30x52")
        console.print(inspect.cleandoc(cls.__doc__ or ""), markup=False)
        console.print(f"\nSource: {cls.source}\n\nDefaults:", markup=False)
        for field, default in cls.parameters().items():
            console.print(f"  {field}: {default!r}", markup=False)
        return
    from dit_accel.layout import TokenLayout, parse_grid
    from dit_accel.pictures import draw, picture_of, picture_of_layer

    layout, target = TokenLayout(parse_grid(grid), text, "before" if text else "none"), output or Path(f"{name}.png")
    if head_table is None:
        picture = picture_of(method, layout, query)
    else:
        from dit_accel.head_table import HeadTable

        picture = picture_of_layer(HeadTable.load(head_table), layer, method, layout, query)
    draw(picture, target)
    shares = ", ".join(f"{share:.4f}" for share in picture.density)
    console.print(f"density {shares}; written: {target}", markup=False)


@methods_app.command("table")
def show_table(
    path: Path, output: Annotated[Path | None, typer.Option(help="Also draw the table into this file.")] = None
) -> None:
    """Print a head table: one line per layer, one sign per head."""
    from dit_accel.head_table import HeadTable

    table = HeadTable.load(path)
    console.print(table.render(), markup=False)
    if output is not None:
        from dit_accel.pictures import draw_table

        draw_table(table, output)
        console.print(f"written: {output}", markup=False)


def parse_parameters(pairs: list[str]) -> dict[str, Any]:
    """`["window=[3, 3, 3]", "density=0.3"]` as parameters; values are YAML."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError("--parameter", f"expected name=value, got {pair!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--parameter {key}", f"expected a YAML value, got {value!r}") from None
    return found
