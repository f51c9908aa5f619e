"""Does a calibrated preset beat uniform ones at equal time? `python samples/calibrate_tiny_wan.py`.

Calibrates the small model on captions it was trained on, for three budgets of time that lie among those of the
candidates (or, with `--density`, for that mean density, half of it and one and a half times it), then compares these
presets with every candidate alone on held-out captions, from the same seeds, interleaved. Uniform presets are compared
with the calibrated ones at their own time, along the line through the three.

A run that was killed, or whose time was up, goes on where it stopped when it is started again. At the end the page
`calibration.md`, its rows as `calibration.csv` and the plot are written to `--results`.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.bench.table import stamp, stream_csv
from dit_accel.calibrate.run import DEFAULT_CANDIDATES, Plan, assign, measure
from dit_accel.calibrate.tasks import calibration_prompts
from dit_accel.calibrate.weights import fingerprint
from dit_accel.calibrate.write import write_preset
from dit_accel.compare.candidates import Candidate, all_candidates, parse_candidate
from dit_accel.compare.equal_time import at_equal_time, equal_time_table
from dit_accel.compare.runner import Task, run_all
from dit_accel.compare.tables import plot_pareto, summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.models import load_pipeline, quiet_loading
from dit_accel.presets import Generation, Preset, load_preset
from dit_accel.schedule import Schedule

UNIFORM = tuple(text for text in DEFAULT_CANDIDATES if text not in ("dense", "radial"))
SHARES = (0.5, 1.0, 1.5)
_SAVES = 0.9
Rows = list[dict[str, Any]]


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=None, help="budgets of density, not of time: the middle one")
    parser.add_argument("--preset", default="tiny-wan/composed")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--candidates", nargs="+", default=UNIFORM, help="uniform presets, which calibration combines")
    parser.add_argument("--calibration-prompts", type=int, default=2)
    parser.add_argument("--num-prompts", type=int, default=8, help="held-out prompts")
    parser.add_argument("--steps", type=int, default=10, help="denoising steps, a fifth of them dense")
    parser.add_argument("--max-minutes", type=float, default=12.0, help="begin no prompt that would end later")
    parser.add_argument("--output", type=Path, default=Path("outputs/calibration"), help="for what a restart needs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="for page, rows and plot")
    return parser.parse_args()


def shortened(base: Preset, steps: int) -> Preset:
    """The preset with so many denoising steps, the first fifth of them dense."""
    schedule = Schedule.make(**{**base.schedule.model_dump(exclude_unset=True), "dense_steps": max(1, steps // 5)})
    generation = base.generation.model_copy(update={"num_inference_steps": steps})
    return base.model_copy(update={"generation": generation, "schedule": schedule})


def calibrated(pipe: Any, base: Preset, arguments: argparse.Namespace, weights: str) -> list[Candidate]:
    """Calibrate once and solve for three budgets, none below what the cheapest candidates need; write the presets."""
    methods = {text: parse_candidate(text, base).method for text in (*arguments.candidates, "dense")}
    prompts = calibration_prompts(base, [], arguments.calibration_prompts, 1000)
    plan = Plan(base, methods, prompts, base.generation, 1000, weights=weights)
    held = measure(pipe, plan, arguments.output / f"statistics-{weights}.safetensors", tell)
    cost = (held.mean_time() if arguments.density is None else held.mean_density())[held.calls > 0]
    for text, alone in zip(methods, cost.mean((0, 1)).tolist(), strict=True):
        tell(f"{text}: {alone:.3f} of dense")
    if arguments.density is None:
        # Among the candidates that save time: a budget like the dearest of them must not buy dense attention.
        alone = sorted(each for each in cost.mean((0, 1)).tolist() if each < _SAVES) or [_SAVES]
        wanted = [sum(alone[:2]) / len(alone[:2]), alone[len(alone) // 2], alone[-1]]
    else:
        wanted = [share * arguments.density for share in SHARES]
    budget, cheapest = "max_time" if arguments.density is None else "max_density", float(cost.amin(-1).mean())
    found = []
    for limit in dict.fromkeys(round(max(1.001 * cheapest, min(1.0, each)), 3) for each in wanted):
        path = arguments.output / f"calibrated-{limit:.3f}.yaml"
        write_preset(path, plan, assign(held, **{budget: limit}), held)
        found.append(replace(parse_candidate(str(path), base), label=f"calibrated, {budget} {limit:.3f}"))
    return found


def compared(
    pipe: Any, generation: Generation, tasks: Sequence[Task], candidates: list[Candidate], path: Path, ends: float
) -> Iterator[Rows]:
    """The rows of each prompt: those that `path` holds, then the others as long as there is time."""
    what = [[c.label, c.method.name, c.method.model_dump_json(), c.schedule.model_dump_json()] for c in candidates]
    key = json.dumps([path.stem, generation.model_dump(mode="json"), what])
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done = [json.loads(line) for line in lines[1:]] if lines[:1] == [key] else []
    done = done[: len(tasks)]
    yield from done
    if len(done) == len(tasks):
        return
    path.write_text("".join(f"{line}\n" for line in (key, *map(json.dumps, done))), encoding="utf-8")
    begun = time.monotonic()
    for number, (_, rows) in enumerate(run_all(pipe, generation, tasks[len(done) :], candidates), start=1):
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows, default=float) + "\n")
        yield rows
        each = (time.monotonic() - begun) / number
        tell(f"held-out prompt {len(done) + number} of {len(tasks)}, {each:.0f} s each")
        if time.monotonic() + each > ends and len(done) + number < len(tasks):
            tell("the time is up; start the command again to go on")
            return


def page(rows: Rows, criteria: tuple[str, ...], head: dict[str, Any], line: list[str], uniform: list[str]) -> str:
    """The page: how it was made, the comparison at equal time with its verdict, and all candidates."""
    title = "# A preset calibrated per layer and head against uniform presets, at equal time\n"
    told = (
        "The small model, held-out captions. Three presets were calibrated from the same statistics; between them PSNR "
        "is interpolated over the ratio, prompt by prompt, to the time of each uniform preset. A uniform preset that "
        "is slower than all of them is compared with the slowest. Losses are shown like gains.\n"
    )
    table = equal_time_table(at_equal_time(rows, line, uniform), "calibrated")
    everything = to_markdown(summarise(rows, criteria), head)
    return f"{title}\n{told}\n{table}\n## All candidates\n\n{everything}"


def tell(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """Calibrate, compare, and write page, rows and plot."""
    arguments = parse_arguments()
    ends = time.monotonic() + 60 * arguments.max_minutes
    base = shortened(load_preset(arguments.preset), arguments.steps)
    quiet_loading()
    pipe = load_pipeline(arguments.model or base.repository)
    weights = fingerprint(pipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    line = calibrated(pipe, base, arguments, weights)
    uniform = list(arguments.candidates)
    candidates = [*all_candidates(uniform, base, ceiling=False), *line]
    tasks, criteria = make_tasks(base, [], arguments.num_prompts, seed=0)
    path = arguments.output / f"rows-{weights}.jsonl"
    rows = [row for made in compared(pipe, base.generation, tasks, candidates, path, ends) for row in made]
    common = {**stamp(), "weights": weights, "command": shlex.join(["python", *sys.argv])}
    head = {**common, "prompts": f"{len(rows) // len(candidates)} of {len(tasks)}", "generation": str(base.generation)}
    text = page(rows, criteria, head, [candidate.label for candidate in line], uniform)
    list(stream_csv(arguments.results / "calibration.csv", rows, common))
    (arguments.results / "calibration.md").write_text(text, encoding="utf-8")
    plot_pareto(summarise(rows, criteria), arguments.results / "calibration.png")
    print(text)


if __name__ == "__main__":
    main()
