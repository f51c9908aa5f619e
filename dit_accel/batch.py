"""Many generations in one run: a file of prompts, a manifest that survives a kill, and a run that continues it."""

from __future__ import annotations

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
FAILURES = (DitAccelError, OSError, ValueError, RuntimeError)
"""What may go wrong with one line and is no reason to stop the others."""


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

    def file_name(self, extension: str) -> str:
        """Name of the result: the line and the seed, never the prompt."""
        return f"{self.number:05d}-seed{self.seed}{extension}"


@dataclass(frozen=True)
class Job:
    """A line that can be run.

    Args:
        item: the line.
        output: name of its result in the folder.
        key: differs where the result would, whether the line, the options of the run, a file it reads or the library
            was changed.
    """

    item: Item
    output: str
    key: str


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be run, and why."""

    number: int
    reason: str


def read_prompts(path: Path, overrides: tuple[str, ...], seed: int = 0) -> list[Item | BadLine]:
    """Read a file with one JSON object per line; empty lines are skipped.

    Args:
        path: the file.
        overrides: keys that a line may hold besides prompt, seed, preset and image.
        seed: of lines that name none. Default 0.

    Raises:
        ConfigError: the file cannot be read or holds nothing.
    """
    try:
        # Not splitlines(): a JSON text may hold what that takes for the end of a line, such as U+2028.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("--prompts", f"cannot read {path}: {error}") from None
    items = [_parse(number, line, overrides, seed) for number, line in enumerate(lines, start=1) if line.strip()]
    if not items:
        raise ConfigError("--prompts", f"{path} holds no line")
    return items


def _parse(number: int, line: str, overrides: tuple[str, ...], usual: int) -> Item | BadLine:
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
    prompt, seed = values.pop("prompt", None), values.pop("seed", usual)
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
        # By name: a file holds what was made last under its name, however often its line was changed to and fro.
        self._made = {entry["output"]: entry["key"] for entry in self._entries() if entry["status"] == "done"}

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

    def is_done(self, job: Job) -> bool:
        """An earlier run made this very result and its file is still there."""
        return self._made.get(job.output) == job.key and (self.folder / job.output).is_file()

    def is_outdated(self, job: Job) -> bool:
        """A file of an earlier run has this name and holds another result."""
        return self._made.get(job.output, job.key) != job.key and (self.folder / job.output).is_file()

    def record(self, item: Item, key: str, output: str, status: str, **details: Any) -> None:
        """Append what became of an item and force it to the disk; `key` as in `Job`, "" where it cannot be run."""
        entry = {"key": key, "line": item.number, "status": status, "output": output}
        before = self.path.read_bytes() if self.path.exists() else b""
        cut_short = bool(before) and not before.endswith(b"\n")
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if cut_short else "") + json.dumps({**entry, "prompt": item.prompt, **details}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def plan_batch(
    items: list[Item | BadLine],
    manifest: Manifest,
    plan: Callable[[Item], tuple[str, str]],
    tell: Callable[[str], None],
) -> list[Job]:
    """Check every line before the first is made; those that cannot be run are reported and recorded here.

    Args:
        items: from `read_prompts`.
        manifest: the record.
        plan: name of an item's result, and a key that differs where the result would; raises where it cannot be run.
        tell: receives one line per item that cannot be run, or was made with other values before.
    """
    jobs = []
    for item in items:
        if isinstance(item, BadLine):
            tell(f"line {item.number}: {item.reason}")
            continue
        try:
            job = Job(item, *plan(item))
        except FAILURES as error:
            manifest.record(item, "", "", "failed", error=reason_of(error))
            tell(f"line {item.number}: {reason_of(error)}")
            continue
        if manifest.is_outdated(job):
            tell(
                f"line {item.number}: {job.output} is there, made with other values, options or files, or by another "
                "version; it is made again"
            )
        jobs.append(job)
    return jobs


def run_batch(
    jobs: list[Job], manifest: Manifest, make: Callable[[Item, Path], None], tell: Callable[[str], None]
) -> int:
    """Run every job that is not done; one that fails is reported and does not stop the rest.

    Args:
        jobs: from `plan_batch`.
        manifest: the record.
        make: generates an item into a file.
        tell: receives one line per job that is run.

    Returns:
        How many are done, those of earlier runs included.
    """
    done = 0
    for job in jobs:
        begun, number = time.perf_counter(), job.item.number
        try:
            if not manifest.is_done(job):
                make(job.item, manifest.folder / job.output)
                seconds = round(time.perf_counter() - begun, 3)
                manifest.record(job.item, job.key, job.output, "done", seconds=seconds)
                tell(f"line {number}: {job.output}")
        except FAILURES as error:
            manifest.record(job.item, job.key, job.output, "failed", error=reason_of(error))
            tell(f"line {number}: {reason_of(error)}")
            continue
        done += 1
    return done


def reason_of(error: BaseException) -> str:
    """An error as one line."""
    return " ".join(str(error).split()) or type(error).__name__
