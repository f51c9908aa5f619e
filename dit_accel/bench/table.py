"""Results as CSV and Markdown: one file per run, with hardware, versions, date and command."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError


def stamp() -> dict[str, str]:
    """Date, hardware, versions and load: the columns that make a row of figures worth keeping.

    "load" is how many processes were at work on the machine in the minute before, where the system says it; above 0 in
    front of a run something else was.
    """
    from dit_accel.report.records import environment

    load = {"load": f"{os.getloadavg()[0]:.1f}"} if hasattr(os, "getloadavg") else {}
    return {"date": time.strftime("%Y-%m-%d"), **environment(), **load}


def stream_csv(
    path: Path | None, rows: Iterable[Mapping[str, Any]], common: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Pass rows on, and write each one, with the values of `common` behind it, as soon as it is there.

    Args:
        path: file to write; its folder is made. None: nothing is written.
        rows: mappings with the same keys.
        common: columns that are the same in every row.

    Raises:
        ConfigError: the file cannot be written; before the first row is asked for.
    """
    if path is None:
        yield from rows
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w", newline="", encoding="utf-8")
    except OSError as error:
        raise ConfigError("--csv", f"cannot write {path}: {error.strerror}") from None
    with file:
        writer: csv.DictWriter[str] | None = None
        for row in rows:
            whole = {**row, **common}
            if writer is None:
                writer = csv.DictWriter(file, list(whole))
                writer.writeheader()
            writer.writerow({name: _cell(value) for name, value in whole.items()})
            file.flush()
            yield row


def _cell(value: Any) -> Any:
    """Six digits of a number, which is more than a timer can tell; nothing for None."""
    return "" if value is None else float(f"{value:.6g}") if isinstance(value, float) else value


def stream_markdown(
    path: Path | None, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, str], common: Mapping[str, Any]
) -> Iterator[Mapping[str, Any]]:
    """Pass rows on, and write those so far as a table, anew after each one, so that an interrupted run keeps its own.

    Args:
        path: file to write; its folder is made. None: nothing is written.
        rows: mappings that have the keys of `columns`.
        columns: keys of a row and how a value is written: a format specification, "" for text.
        common: what holds for all rows; stands above the table.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        yield from rows
        return
    stamp = ", ".join(f"{name} {value}" for name, value in common.items())
    lines = [stamp, "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = ("" if row[name] in (None, "") else format(row[name], how) for name, how in columns.items())
        lines.append(f"| {' | '.join(cells)} |")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError("--markdown", f"cannot write {path}: {error.strerror}") from None
        yield row
