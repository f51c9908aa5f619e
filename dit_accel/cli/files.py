"""JSON reports beside results: the path is checked before the first step, the file appears when it is complete."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError


def report_path(report: Path | None, target: Path) -> Path:
    """Where the report of a result goes; its folder is made, and can be written to.

    Args:
        report: the option `--report`; None: beside the result.
        target: the result.

    Raises:
        ConfigError: the result itself, a directory, or a folder that cannot be made or written to.
    """
    target = target.expanduser()
    path = target.with_suffix(".json") if report is None else report.expanduser()
    if path == target:
        raise ConfigError("--report", f"{path} is the result itself; give another name")
    check_folder(path, "--report")
    return path


def check_folder(path: Path, option: str) -> None:
    """Make the folder of a file that a long run will end with, and see that it can be written to.

    Args:
        path: the file.
        option: that named it.

    Raises:
        ConfigError: a directory, or a folder that cannot be made or written to.
    """
    if path.is_dir():
        raise ConfigError(option, f"{path} is a directory; give a file name in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(option, f"cannot make {path.parent}: {error.strerror}") from None
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(option, f"cannot write in {path.parent}")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write under a temporary name, then rename."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)
