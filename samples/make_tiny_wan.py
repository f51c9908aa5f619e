"""Make and judge the small model and its causal sibling: `python samples/make_tiny_wan.py --size full --device cuda`.

One command for all stages, which goes on where it was stopped or killed. With `--max-minutes 9` it saves, stops with
status 75 and wants to be run again until it leaves with 0. What it made lies in the output folder: `tiny-wan`,
`tiny-wan-causal`, `clips-...` and the verdicts as JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from dit_accel.samples import evaluate_stream, evaluate_tiny_wan
from dit_accel.samples.clip_folder import weights_digest
from dit_accel.samples.tiny_wan_recipes import RECIPES, Recipe
from dit_accel.samples.tiny_wan_run import OutOfTime, Place
from dit_accel.samples.train_tiny_wan import UNFINISHED, add_place, read_place, run_stages, stretch
from dit_accel.samples.train_tiny_wan_causal import run_causal_stages


def make(place: Place, output: Path, recipe: Recipe, seed: int, prompts: int, preset: str) -> None:
    """Run the stages that are not finished yet.

    Args:
        place: where to run, and until when.
        output: folder of all results.
        recipe: of both models.
        seed: of everything.
        prompts: how many the models are judged by.
        preset: whose sizes, steps and stream the models are made and judged for.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    whole, causal = output / "tiny-wan", output / "tiny-wan-causal"
    judged = ["--preset", preset, "--num-prompts", str(prompts), "--seed", str(seed)]

    def judge_clips() -> None:
        clips = output / f"clips-{weights_digest(str(whole))[:8]}"  # those of other weights may lie beside
        options = ["--model", str(whole), "--device", place.device, "--clips", str(clips)]
        evaluate_tiny_wan.main([*judged, *options, "--output", str(output / "verdicts.json")])

    def judge_streams() -> None:
        options = ["--model", str(causal), "--output", str(output / "streams.json")]
        evaluate_stream.main([*judged, *options])

    stages: dict[str, Callable[[], None]] = {
        "model": lambda: run_stages(place, whole, recipe, seed),
        "causal": lambda: run_causal_stages(place, causal, str(whole), preset, recipe, seed),
        "clips": judge_clips,
        "streams": judge_streams,
    }
    for name, stage in stages.items():
        finished = place.work / f"{name}.done"
        if not finished.exists():
            place.check_time(f"stage {name}")
            begun = time.monotonic()
            stage()
            finished.touch()
            print(f"stage {name}: {time.monotonic() - begun:.0f} s in this call", flush=True)


def main(given: Sequence[str] | None = None) -> None:
    """Run the stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=RECIPES, default="full", help="which recipe")
    parser.add_argument("--work", type=Path, default=Path("work/made"), help="folder of checkpoints")
    parser.add_argument("--output", type=Path, default=Path("outputs/made"), help="folder of the results")
    parser.add_argument(
        "--preset", default="tiny-wan/dense", help="whose sizes, steps and stream to make and judge for"
    )
    parser.add_argument("--num-prompts", type=int, default=64)
    add_place(parser)
    arguments = parser.parse_args(given)
    recipe = stretch(RECIPES[arguments.size], arguments.stretch)
    place = read_place(arguments, recipe)
    arguments.output.mkdir(parents=True, exist_ok=True)
    try:
        make(place, arguments.output, recipe, arguments.seed, arguments.num_prompts, arguments.preset)
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
