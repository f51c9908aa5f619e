"""Train the small Wan pipeline from nothing: `python samples/train_tiny_wan.py --work work/tiny-wan`.

Stages: autoencoder, bank of encoded clips, transformer with its text encoder, export. A killed run resumes from the
work folder; a finished stage is not run again. Without `--size` the model that ships is made: a small one is trained
and grown, or that of `--start` is grown; `--processes 2` makes best use of two cores. On a GPU `--size full
--device cuda` makes the full model; where a GPU is lent for minutes at a time, `--max-minutes 9` saves and stops with
status 75 until everything is done.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from dit_accel.errors import ConfigError
from dit_accel.models import check_model
from dit_accel.samples.team import Team
from dit_accel.samples.tiny_wan_flow import train_transformer
from dit_accel.samples.tiny_wan_grown import start_from, take_vae
from dit_accel.samples.tiny_wan_recipes import RECIPES, Pace, Recipe
from dit_accel.samples.tiny_wan_run import OutOfTime, Place
from dit_accel.samples.tiny_wan_vae import encode_bank, train_vae

UNFINISHED = 75  # exit status: the time is over, the work is not


def run_stages(place: Place, output: Path, recipe: Recipe, seed: int, start: Path | None = None) -> None:
    """All stages that are not finished yet.

    Args:
        place: where to run, and until when.
        output: folder of the pipeline.
        recipe: of the model.
        seed: of everything.
        start: pipeline folder to grow. Default None: where the recipe grows a model, one is made in the work folder.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    flow = recipe.flow
    if recipe.start is not None and start is None:
        start = place.work / "start"
        first = replace(place, work=place.work / "start-work", is_half=recipe.start.is_half)
        first.work.mkdir(exist_ok=True)
        run_stages(first, start, recipe.start, seed)
    vae = train_vae(place, recipe, seed) if start is None else take_vae(place, start, recipe)
    place.check_time("the bank of clips")
    bank = encode_bank(place, vae, recipe, flow.canvas, flow.clips, flow.encode_batch, seed)
    begin = None if start is None else start_from(start, recipe)
    place.together(train_transformer, output, recipe, bank, seed, begin)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options that say where and for how long a training runs, see `read_place`."""
    parser.add_argument("--device", default="cpu", help="where PyTorch computes: cpu or cuda")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="then save, and stop with status 75")
    parser.add_argument("--stretch", type=float, default=1.0, help="times the minutes of the recipe for each stage")
    parser.add_argument("--processes", type=int, default=1, help="that train together on a CPU, one per core or fewer")
    parser.add_argument("--seed", type=int, default=0)


def stretch(recipe: Recipe, factor: float) -> Recipe:
    """The recipe with `factor` times the minutes for every stage that is measured in minutes."""

    def longer(pace: Pace) -> Pace:
        return pace if pace.minutes is None else replace(pace, minutes=pace.minutes * factor)

    return replace(
        recipe,
        vae=replace(recipe.vae, pace=longer(recipe.vae.pace)),
        flow=replace(recipe.flow, pace=longer(recipe.flow.pace)),
        causal=replace(recipe.causal, pace=longer(recipe.causal.pace)),
    )


def read_place(arguments: argparse.Namespace, recipe: Recipe) -> Place:
    """Where the options of `add_place` and `--work` say; makes the work folder, and seeds PyTorch.

    Raises:
        ConfigError: several processes on a device that is no CPU, or fewer than one.
    """
    if arguments.processes < 1 or (arguments.processes > 1 and torch.device(arguments.device).type != "cpu"):
        raise ConfigError("processes", f"expected 1, or more on cpu, got {arguments.processes} on {arguments.device}")
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high" if recipe.is_half else "highest")
    deadline, team = time.monotonic() + 60 * arguments.max_minutes, Team(size=arguments.processes)
    return Place(arguments.work, arguments.device, recipe.is_half, deadline, team)


def main(given: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=RECIPES, default="grown", help="which recipe")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan"), help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-wan", help="folder of the result")
    parser.add_argument("--start", type=Path, default=None, help="with --size grown: pipeline folder to grow")
    parser.add_argument("--vae-steps", type=int, default=None, help="instead of the recipe's, whatever time they take")
    parser.add_argument("--steps", type=int, default=None, help="of the transformer, likewise")
    add_place(parser)
    arguments = parser.parse_args(given)
    recipe = RECIPES[arguments.size]
    if arguments.start is not None and recipe.start is None:
        parser.error(f"--start: recipe {recipe.name} makes its model from nothing; use it with --size grown")
    if arguments.vae_steps is not None:
        recipe = replace(recipe, vae=replace(recipe.vae, pace=Pace(arguments.vae_steps)))
    if arguments.steps is not None:
        recipe = replace(recipe, flow=replace(recipe.flow, pace=Pace(arguments.steps)))
    recipe = stretch(recipe, arguments.stretch)
    try:
        start = None if arguments.start is None else Path(check_model(str(arguments.start)))
        run_stages(read_place(arguments, recipe), arguments.output, recipe, arguments.seed, start)
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
