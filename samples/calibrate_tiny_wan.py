"""Does a calibrated preset beat uniform ones at equal time? `python samples/calibrate_tiny_wan.py`.

Calibrates the small model on captions it was trained on, for budgets of time from that of the fastest candidate to
that of the slowest that saves any, then compares these presets with every candidate alone on held-out captions, from
the same seeds, interleaved. One candidate also runs alone with twice as many dense steps. Each uniform preset is
compared at its own time with the line through the calibrated ones.

A run that was killed, or whose time was up, goes on where it stopped when it is started again. At the end the page
`calibration.md`, its rows as `calibration.csv` and the plot are written to `--results`.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.bench.table import stamp, stream_csv
from dit_accel.calibrate.assign import assign, palettes
from dit_accel.calibrate.finalists import only
from dit_accel.calibrate.run import DEFAULT_CANDIDATES, Plan, measure
from dit_accel.calibrate.tasks import calibration_prompts
from dit_accel.calibrate.weights import fingerprint
from dit_accel.calibrate.write import head_table, prediction, write_preset
from dit_accel.compare.candidates import Candidate, all_candidates, parse_candidate
from dit_accel.compare.equal_time import at_equal_time, equal_time_table
from dit_accel.compare.resume import Rows, resumed
from dit_accel.compare.tables import plot_pareto, summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.models import load_pipeline, quiet_loading
from dit_accel.presets import Preset, load_preset
from dit_accel.schedule import Schedule

UNIFORM = tuple(text for text in DEFAULT_CANDIDATES if text.startswith(("composed", "aurora")))
BUDGETS = 6
PARTS = 1  # steps differ by far more than layers do
SAVES = 0.9  # a budget like the dearest candidate's must not buy dense attention


def parse_arguments() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan/composed")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--candidates", nargs="+", default=UNIFORM, help="uniform presets, which calibration combines")
    parser.add_argument(
        "--later",
        nargs="*",
        default=["aurora:density=0.1"],
        help="those that also run alone with twice as many dense steps",
    )
    parser.add_argument("--calibration-prompts", type=int, default=3)
    parser.add_argument("--num-prompts", type=int, default=8, help="held-out prompts")
    parser.add_argument("--seed", type=int, default=1, help="of the held-out prompts")
    parser.add_argument("--num-frames", type=int, default=15, help="whole tiles lose nothing at edges")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps, a fifth of them dense")
    parser.add_argument("--max-minutes", type=float, default=60.0, help="begin no prompt that would end later")
    parser.add_argument("--output", type=Path, default=Path("outputs/calibration"), help="for what a restart needs")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="for page, rows and plot")
    return parser.parse_args()


def shortened(base: Preset, steps: int, num_frames: int) -> Preset:
    """The preset with so many denoising steps, the first fifth of them dense, and so many frames."""
    dense = {"dense_steps": max(1, steps // 5)}
    schedule = Schedule.make(**{**base.schedule.model_dump(exclude_unset=True), **dense})
    generation = base.generation.model_copy(update={"num_inference_steps": steps, "num_frames": num_frames})
    return base.model_copy(update={"generation": generation, "schedule": schedule})


def calibrated(pipe: Any, base: Preset, arguments: argparse.Namespace, weights: str) -> list[Candidate]:
    """Calibrate once and solve for budgets among the times of the candidates; the presets written."""
    methods = {text: parse_candidate(text, base).method for text in (*arguments.candidates, "dense")}
    prompts = calibration_prompts(base, [], arguments.calibration_prompts, 1000)
    ranges = arguments.steps - max(1, arguments.steps // 5)  # every step that is not dense
    sizes = {"ranges": ranges, "parts": PARTS, "alone": True}
    plan = Plan(base, methods, prompts, base.generation, 1000, weights=weights, **sizes)
    held = measure(pipe, plan, arguments.output / f"statistics-{weights}.safetensors", tell)
    among = palettes(plan)
    alone = [assign(held, max_density=1.0, among=[only(index, among)]) for index in range(len(methods))]
    for text, one in zip(methods, alone, strict=True):
        tell(f"{text}: {prediction(one)}")
    made = []
    for limit in budgets([one.time for one in alone]):
        found, path = assign(held, max_time=limit, among=among, starts=plan.starts), arguments.output / f"{limit}.yaml"
        write_preset(path, plan, found, held)
        tell(f"for {limit} of the time: {prediction(found)}\n{head_table(found, methods).render()}")
        made.append(replace(parse_candidate(str(path), base), label=f"calibrated for {limit} of the time"))
    return made


def budgets(times: Sequence[float | None]) -> list[float]:
    """Budgets of time from that of the fastest candidate to that of the slowest that saves time, evenly.

    Within less time there is nothing to choose. Where none saves any, the least that can be asked for.
    """
    known = sorted(each for each in times if each is not None)
    saving = [each for each in known if each < SAVES] or known[:1]
    steps = [saving[0] + (saving[-1] - saving[0]) * number / (BUDGETS - 1) for number in range(BUDGETS)]
    return list(dict.fromkeys(math.ceil(1000 * each) / 1000 for each in steps))


def page(rows: Rows, criteria: tuple[str, ...], head: dict[str, Any], line: list[str], uniform: list[str]) -> str:
    """The page: how it was made, the comparison at equal time with its verdict, and all candidates."""
    title = "# A preset calibrated per layer, head and step against uniform presets, at equal time\n"
    told = (
        f"The small model, held-out captions. {len(line)} presets were calibrated from the same statistics; between "
        "them PSNR is interpolated over the ratio, prompt by prompt, to the time of each uniform preset. A uniform "
        "preset that is slower than all of them is compared with the slowest; within the time of the fastest there is "
        "nothing to choose. Losses are shown like gains.\n"
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
    base = shortened(load_preset(arguments.preset), arguments.steps, arguments.num_frames)
    quiet_loading()
    pipe = load_pipeline(arguments.model or base.repository)
    weights = fingerprint(pipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    line = calibrated(pipe, base, arguments, weights)
    twice = 2 * max(1, arguments.steps // 5)
    uniform = [*arguments.candidates, *(f"{text},dense_steps={twice}" for text in arguments.later)]
    candidates = [*all_candidates(uniform, base, ceiling=False), *line]
    tasks, criteria = make_tasks(base, [], arguments.num_prompts, arguments.seed)
    path = arguments.output / f"rows-{weights}.jsonl"
    rows = [r for made in resumed(pipe, base.generation, tasks, candidates, path, weights, tell, ends) for r in made]
    common = {**stamp(), "weights": weights, "command": shlex.join(["python", *sys.argv])}
    head = {**common, "prompts": f"{len(rows) // len(candidates)} of {len(tasks)}", "generation": str(base.generation)}
    text = page(rows, criteria, head, [candidate.label for candidate in line], uniform)
    list(stream_csv(arguments.results / "calibration.csv", rows, common))
    (arguments.results / "calibration.md").write_text(text, encoding="utf-8")
    plot_pareto(summarise(rows, criteria), arguments.results / "calibration.png")
    print(text)


if __name__ == "__main__":
    main()
