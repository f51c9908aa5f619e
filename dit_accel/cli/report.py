"""`dit-accel report`: read the JSON of a run, and show it as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dit_accel.cli.app import console


def report(
    run: Annotated[Path, typer.Argument(help="JSON report of a run.")],
    html: Annotated[Path | None, typer.Option(help="Page to write. Default: the report's name with .html.")] = None,
    video: Annotated[Path | None, typer.Option(help="Video to embed. Default: the one beside the report.")] = None,
) -> None:
    """Show a run on one self-contained page: density, time and error over layers and steps, plans, preset, video."""
    from dit_accel.errors import ConfigError
    from dit_accel.report.page import find_video, read_run, render_page

    if video is not None and not video.is_file():
        raise ConfigError("--video", f"no such file: {video}")
    page = render_page(read_run(run), video or find_video(run))
    target = html or run.with_suffix(".html")
    try:
        target.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--html", f"cannot write {target}: {error.strerror}") from None
    console.print(f"page: {target} ({len(page) / 1024:.0f} KiB)", markup=False)
