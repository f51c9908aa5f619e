"""Results as CSV: one file per run, every row with hardware, versions, date and command."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError


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
            writer.writerow({name: "" if value is None else value for name, value in whole.items()})
            file.flush()
            yield row
