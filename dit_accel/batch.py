"""Many generations in one run: a file of prompts, a manifest that survives a kill, and a run that continues it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError, DitAccelError, near_matches

MANIFEST = "manifest.jsonl"
LARGEST_SEED = 2**64 - 1
"""What PyTorch takes at most."""
_OWN_KEYS = ("prompt", "seed", "preset", "image")


@dataclass(frozen=True)
class Item:
    """One line of a file of prompts.

    Args:
        number: number of the line, from 1.
        prompt: what to show.
        seed: seed of the noise. Default 0.
        preset: preset instead of the run's; None: the run's.
        image: first frame for image-to-video; None: none.
        overrides: generation values and method parameters laid over the preset, by their names on the command line
            with underscores.
    """

    number: int
    prompt: str
    seed: int = 0
    preset: str | None = None
    image: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Tells this item from one whose line was changed between two runs."""
        content = [self.prompt, self.seed, self.preset, self.image, sorted(self.overrides.items())]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]

    def file_name(self, extension: str) -> str:
        """Name of the result: the line and the seed, never the prompt."""
        return f"{self.number:05d}-seed{self.seed}{extension}"


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be run, and why."""

    number: int
    reason: str


def read_prompts(path: Path, overrides: tuple[str, ...]) -> list[Item | BadLine]:
    """Read a file with one JSON object per line; empty lines are skipped.

    Args:
        path: the file.
        overrides: keys that a line may hold besides prompt, seed, preset and image.

    Raises:
        ConfigError: the file cannot be read or holds nothing.
    """
    try:
        # Not splitlines(): a JSON text may hold what that takes for the end of a line, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", f"cannot read {path}: {error}") from None
    items = [_parse(number, line, overrides) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ConfigError("--prompts", f"{path} holds no line")
    return items


def _parse(number: int, line: str, overrides: tuple[str, ...]) -> Item | BadLine:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        return BadLine(number, f"not JSON: {error}")
    if not isinstance(values, dict):
        return BadLine(number, f'expected an object such as {{"prompt": "..."}}, got {type(values).__name__}')
    known = (*_OWN_KEYS, *overrides)
    for key in values:
        if key not in known:
            return BadLine(number, f"unknown key {key!r}{near_matches(key, known)}")
    prompt, seed = values.pop("prompt", None), values.pop("seed", 0)
    if not isinstance(prompt, str) or not prompt.strip():
        return BadLine(number, f"prompt: expected a text, got {prompt!r}")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= LARGEST_SEED:
        return BadLine(number, f"seed: expected an integer from 0 to 2**64 - 1, got {seed!r}")
    preset, image = values.pop("preset", None), values.pop("image", None)
    for name, value in (("preset", preset), ("image", image)):
        if value is not None and not isinstance(value, str):
            return BadLine(number, f"{name}: expected a text, got {value!r}")
    return Item(number, prompt, seed, preset, image, values)


class Manifest:
    """The record of a batch beside its results: one JSON line per finished or failed item, appended and flushed.

    Args:
        folder: where results go; made when missing.
        resume: continue an earlier run. Without it, a folder that holds a manifest is refused.

    Raises:
        ConfigError: the folder cannot be written to, or holds a manifest and `resume` is False.
    """

    def __init__(self, folder: Path, resume: bool) -> None:
        self.folder, self.path = folder, folder / MANIFEST
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("--output-dir", f"cannot make {folder}: {error.strerror}") from None
        if self.path.exists() and not resume:
            raise ConfigError("--output-dir", f"{folder} holds an earlier batch; use --resume or another folder")
        self._done = {entry["key"]: entry for entry in self._entries() if entry["status"] == "done"}

    def _entries(self) -> Iterator[dict[str, Any]]:
        if not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line a kill cut short; its item runs again
            if isinstance(entry, dict) and {"key", "status", "output"} <= entry.keys():
                yield entry

    def is_done(self, item: Item) -> bool:
        """An earlier run finished this item and its file is still there."""
        entry = self._done.get(f"{item.number}:{item.key}")
        return entry is not None and (self.folder / entry["output"]).is_file()

    def record(self, item: Item, output: str, status: str, **details: Any) -> None:
        """Append what became of an item and force it to the disk."""
        entry = {"key": f"{item.number}:{item.key}", "line": item.number, "status": status, "output": output}
        before = self.path.read_bytes() if self.path.exists() else b""
        cut_short = bool(before) and not before.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + json.dumps({**entry, "prompt": item.prompt, **details}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def run_batch(
    items: list[Item | BadLine],
    manifest: Manifest,
    make: Callable[[Item, Path], None],
    tell: Callable[[str], None],
    extension: Callable[[Item], str] = lambda item: ".mp4",
) -> tuple[int, int]:
    """Run every item that is not done; one that fails is reported and does not stop the rest.

    Args:
        items: from `read_prompts`.
        manifest: the record.
        make: generates an item into a file.
        tell: receives one line per item.
        extension: of an item's result; a preset that is not known is that item's failure. Default ".mp4".

    Returns:
        How many are done, those of earlier runs included, and how many there are.
    """
    done = 0
    for item in items:
        if isinstance(item, BadLine):
            tell(f"line {item.number}: {item.reason}")
            continue
        begun, output = time.perf_counter(), ""
        try:
            output = item.file_name(extension(item))
            if not manifest.is_done(item):
                make(item, manifest.folder / output)
                manifest.record(item, output, "done", seconds=round(time.perf_counter() - begun, 3))
                tell(f"line {item.number}: {output}")
        except (DitAccelError, OSError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            manifest.record(item, output, "failed", error=reason)
            tell(f"line {item.number}: {reason}")
            continue
        done += 1
    return done, len(items)
