"""Results as CSV and Markdown: one file per run, with hardware, versions, date and command."""

from __future__ import annotations

import csv
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from dit_accel.errors import ConfigError

_log = logging.getLogger(__name__)


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

    The file is called NAME.partial until the last row is in it, so that a run that fails leaves an earlier result as it
    was, and its own rows beside it.

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
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("a", newline="", encoding="utf-8")
    except OSError as error:
        raise ConfigError("--csv", f"cannot write {path}: {error.strerror}") from None
    count = 0
    try:
        with file:
            for count, row in enumerate(rows, start=1):
                _write_row(file, {**row, **common}, is_first=count == 1)
                yield row
            if not count:
                file.truncate(0)
        os.replace(partial, path)
    except BaseException:
        if count:
            _log.warning("%s is not complete; the rows of this run, %d, are in %s", path, count, partial)
        elif not partial.stat().st_size:
            partial.unlink()
        raise


def _write_row(file: TextIO, row: Mapping[str, Any], is_first: bool) -> None:
    """Append a row; the first one replaces what an earlier run left, and brings the names of the columns."""
    writer = csv.DictWriter(file, list(row))
    if is_first:
        file.truncate(0)
        writer.writeheader()
    writer.writerow({name: _cell(value) for name, value in row.items()})
    file.flush()


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
