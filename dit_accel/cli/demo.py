"""`dit-accel demo`: the Gradio page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.app import console
from dit_accel.errors import UnsupportedError


def demo(
    preset: Annotated[str, typer.Option(help="Preset whose model is shown.")] = "tiny-wan",
    model: Annotated[str | None, typer.Option(help="Pipeline folder or hub id instead of the preset's.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    output_dir: Annotated[Path, typer.Option(help="Folder of all files that are written.")] = Path("outputs/demo"),
    host: Annotated[str, typer.Option(help="Address to listen on; other machines see 0.0.0.0.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Ask Gradio for a public address.")] = False,
) -> None:
    """Show dense and accelerated generation side by side in the browser."""
    try:
        from dit_accel.pipelines.demo.app import launch
        from dit_accel.pipelines.demo.jobs import Studio
    except ImportError as error:
        raise UnsupportedError(f"the demo needs {error.name}; install it with: pip install 'dit_accel[demo]'") from None

    studio = Studio(preset, output_dir, device, dtype, model)
    console.print(f"model: {model or studio.preset.repository}; files go to {output_dir}", markup=False)
    launch(studio, host, port, share)
