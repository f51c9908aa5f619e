"""Methods ranked by renders paired with dense: `python samples/rank_methods.py`.

Renders held-out captions of the small model with every method from the same seeds, against dense on the same dense
kernel, and writes docs/results/ranking.csv, one row per render, and docs/results/ranking.md. Rows that are there
already and were made with the same settings are kept, so a run that was killed goes on where it stopped. Needs the
`metrics` extra.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dit_accel.bench.random_blocks import RandomBlocks
from dit_accel.bench.table import stamp
from dit_accel.compare.candidates import Candidate, parse_candidate, references
from dit_accel.compare.runner import Task, run_task
from dit_accel.compare.tables import summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.models import load_pipeline
from dit_accel.presets import Generation, Preset, load_preset
from dit_accel.samples.clip_folder import weights_digest
from dit_accel.schedule import Schedule

RANDOM = "random blocks"
PAIRS = "## Pairs"
# All keep the same share of blocks in the sparse steps, and the same steps dense.
METHODS = (
    "aurora",
    "aurora:remainder=drop",
    "pisa",
    "composed:order=bisect",
    "svg2",
    "adaspa:search_steps=[1]",
    "xattention",
    "subblock",
    "sparge:similarity=-1",
    "radial",
)
_NUMBERS = ("seconds", "ratio", "ratio_low", "ratio_high", "density", "psnr", "ssim", "lpips", "flicker")
_OTHER_NUMBERS = ("flicker_dense", "error_bound", "peak_mib")


def candidates_of(texts: Sequence[str], base: Preset, density: float, dense_steps: int) -> list[Candidate]:
    """Dense, random blocks, and the methods at a density, where they take one, after some dense steps."""
    found = [references(base)[0]]
    schedule = Schedule(dense_steps=((0, dense_steps),)) if dense_steps else Schedule()
    found.append(Candidate(RANDOM, RandomBlocks(density=density), schedule))
    for text in texts:
        name, _, rest = text.partition(":")
        given = [part for part in (rest, f"dense_steps={dense_steps}") if part]
        if name != "radial" and "density=" not in rest:
            given.append(f"density={density}")
        made = parse_candidate(f"{name}:{','.join(given)}", base)
        found.append(Candidate(text, made.method, made.schedule))
    return found


def fingerprint(repository: str, generation: Generation, candidates: Sequence[Candidate], count: int) -> str:
    """What rows must share to stand in one table: weights, sizes, prompts and candidates."""
    told = [str(generation), count, *((c.label, c.method.model_dump_json(), str(c.schedule)) for c in candidates)]
    return hashlib.sha256((weights_digest(repository) + json.dumps(told)).encode()).hexdigest()[:12]


def kept_rows(path: Path, run: str) -> list[dict[str, Any]]:
    """Rows of an earlier, possibly killed, run with the same fingerprint, with numbers and truths as such."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows: list[dict[str, Any]] = [row for row in csv.DictReader(file) if row["run"] == run]
    for row in rows:
        for name, value in row.items():
            if name in (*_NUMBERS, *_OTHER_NUMBERS):
                row[name] = float(value) if value else None
            elif value in ("True", "False"):
                row[name] = value == "True"
    return rows


def whole_tasks(rows: list[dict[str, Any]], labels: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of those prompts that every candidate has rendered."""
    done: dict[Any, set[str]] = {}
    for row in rows:
        done.setdefault((row["prompt"], str(row["seed"])), set()).add(row["candidate"])
    return [row for row in rows if done[row["prompt"], str(row["seed"])] >= set(labels)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """The whole table, replaced in one move so that a kill leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in rows)
    part.replace(path)


def rank(
    pipe: Any,
    generation: Generation,
    tasks: Sequence[Task],
    candidates: Sequence[Candidate],
    path: Path,
    run: str,
) -> list[dict[str, Any]]:
    """Render what is not in the table yet, one prompt after the other, and return all rows."""
    rows = whole_tasks(kept_rows(path, run), [candidate.label for candidate in candidates])
    done = {(row["prompt"], str(row["seed"])) for row in rows}
    for number, task in enumerate(tasks):
        if (task.prompt, str(task.seed)) in done:
            continue
        outcomes = run_task(pipe, generation, task, candidates, rounds=1, shift=number)
        assert outcomes[0].clip is not None
        rows += [{"run": run, **outcome.to_dict(outcomes[0].clip)} for outcome in outcomes]
        write_rows(path, rows)
        print(f"{number + 1} of {len(tasks)}: {task.prompt}", flush=True)
    return rows


def page(rows: Sequence[dict[str, Any]], criteria: Sequence[str], generation: Generation, rule: str) -> str:
    """The table, closest to dense first, and how often each method was closer than the next by PSNR."""
    lines = summarise(rows, criteria)
    ranked = sorted(lines, key=lambda line: -line.psnr)
    psnr = {line.candidate: [row["psnr"] for row in rows if row["candidate"] == line.candidate] for line in ranked}
    names = [line.candidate for line in ranked if line.candidate != "dense"]
    paired = ["| method | PSNR, median | prompts on which it is closer than the next |", "|---|---|---|"]
    for name, other in zip(names, [*names[1:], None], strict=True):
        won = "" if other is None else f"{sum(a > b for a, b in zip(psnr[name], psnr[other], strict=True))}"
        won += f" of {len(psnr[name])}" if won else ""
        paired.append(f"| {name} | {statistics.median(psnr[name]):.2f} dB | {won} |")
    head = {
        **stamp(),
        "command": shlex.join(["python", "samples/rank_methods.py", *sys.argv[1:]]),
        "prompts": len(psnr["dense"]),
        "canvas": f"{generation.num_frames} frames of {generation.height} x {generation.width}, "
        f"{generation.num_inference_steps} steps",
        "rule": rule,
    }
    text = to_markdown(ranked, head)
    return "\n\n".join(["# Methods ranked by paired renders", text, PAIRS, "\n".join(paired)]) + "\n"


def main() -> None:
    """Render, write the CSV as it goes, and the page at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), help="as `dit-accel compare` takes them")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--density", type=float, default=0.25)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dense-steps", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    preset = load_preset("tiny-wan")
    size = {"num_frames": arguments.frames, "height": arguments.size, "width": arguments.size}
    generation = preset.generation.model_copy(update={**size, "num_inference_steps": arguments.steps})
    candidates = candidates_of(arguments.methods, preset, arguments.density, arguments.dense_steps)
    tasks, criteria = make_tasks(preset, (), arguments.num_prompts, arguments.seed)
    run = fingerprint(preset.repository, generation, candidates, len(tasks))
    pipe = load_pipeline(preset.repository)
    rows = rank(pipe, generation, tasks, candidates, arguments.out / "ranking.csv", run)
    rule = f"density {arguments.density} in sparse steps, {arguments.dense_steps} dense steps; radial by its own rule"
    text = page(rows, criteria, generation, rule)
    (arguments.out / "ranking.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
