"""Train the small Wan pipeline from nothing: `python samples/train_tiny_wan.py --work work/tiny-wan`.

Stages: autoencoder, bank of encoded clips, transformer with its text encoder, export. A killed run resumes from the
work folder; a finished stage is not run again. On a GPU `--size full --device cuda` makes the full model; where a GPU
is lent for minutes at a time, `--max-minutes 9` saves and stops with status 75 until everything is done.
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

from dit_accel.samples.tiny_wan_flow import train_transformer
from dit_accel.samples.tiny_wan_recipes import RECIPES, Pace, Recipe
from dit_accel.samples.tiny_wan_run import OutOfTime, Place
from dit_accel.samples.tiny_wan_vae import encode_bank, train_vae

UNFINISHED = 75  # exit status: the time is over, the work is not


def run_stages(place: Place, output: Path, recipe: Recipe, seed: int) -> None:
    """All stages that are not finished yet.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    flow = recipe.flow
    vae = train_vae(place, recipe, seed)
    place.check_time("the bank of clips")
    bank = encode_bank(place, vae, recipe, flow.canvas, flow.clips, flow.encode_batch, seed)
    train_transformer(place, output, recipe, bank, seed)


def add_place(parser: argparse.ArgumentParser) -> None:
    """Options that say where and for how long a training runs, see `read_place`."""
    parser.add_argument("--device", default="cpu", help="where PyTorch computes: cpu or cuda")
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="then save, and stop with status 75")
    parser.add_argument("--stretch", type=float, default=1.0, help="times the minutes of the recipe for each stage")
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
    """Where the options of `add_place` and `--work` say; makes the work folder, and seeds PyTorch."""
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    torch.set_float32_matmul_precision("high" if recipe.is_half else "highest")
    return Place(arguments.work, arguments.device, recipe.is_half, time.monotonic() + 60 * arguments.max_minutes)


def main(given: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=RECIPES, default="small", help="which recipe")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan"), help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-wan", help="folder of the result")
    parser.add_argument("--vae-steps", type=int, default=None, help="instead of the recipe's, whatever time they take")
    parser.add_argument("--steps", type=int, default=None, help="of the transformer, likewise")
    add_place(parser)
    arguments = parser.parse_args(given)
    recipe = RECIPES[arguments.size]
    if arguments.vae_steps is not None:
        recipe = replace(recipe, vae=replace(recipe.vae, pace=Pace(arguments.vae_steps)))
    if arguments.steps is not None:
        recipe = replace(recipe, flow=replace(recipe.flow, pace=Pace(arguments.steps)))
    recipe = stretch(recipe, arguments.stretch)
    try:
        run_stages(read_place(arguments, recipe), arguments.output, recipe, arguments.seed)
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
