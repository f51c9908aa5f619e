"""Fine-tune the small model for streams: `python samples/train_tiny_wan_causal.py --work work/tiny-wan-causal`.

The finished bidirectional model learns to make a clip chunk by chunk, as its preset streams. Clips are longer than
those it was made with, and the object bounces off the edges, so that a stream may go on for ever. Text encoder and
autoencoder stay as they are. A killed run resumes from the work folder.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.models import check_model
from dit_accel.presets import load_preset
from dit_accel.samples.cheap_attention import PaddedCrossAttention
from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.repertoire import repertoire_of
from dit_accel.samples.tiny_wan_causal import CausalTeacher, Excerpt, draw_excerpt
from dit_accel.samples.tiny_wan_flow import ADAM_PARTS, DECAY, DROP_CAPTION, Captioner, choose_padding
from dit_accel.samples.tiny_wan_model import save_part
from dit_accel.samples.tiny_wan_recipes import RECIPES, CausalRecipe, Pace, Recipe
from dit_accel.samples.tiny_wan_run import OutOfTime, Place, TrainingRun, linear_rate, replace_parts
from dit_accel.samples.tiny_wan_vae import Bank, encode_bank
from dit_accel.samples.train_tiny_wan import UNFINISHED, add_place, read_place, stretch
from dit_accel.streaming import StreamSettings


def excerpts(settings: StreamSettings, frames: int, window: int = 4) -> list[list[Excerpt]]:
    """Of a clip of `frames` latent frames: its first chunk alone, its start, and from every later chunk on.

    The first chunk decides what the object is, and later ones copy it: it is taught most often. The others are
    `window` chunks long.
    """
    last = frames // settings.chunk - 1
    opening, begin = [Excerpt.of(settings, 1, 0)], [Excerpt.of(settings, 1, min(window - 1, last))]
    return [opening, begin, [Excerpt.of(settings, first, first + window - 1) for first in range(2, last - window + 2)]]


def train_causal(
    place: Place, output: Path, start: str, bank: Bank, settings: StreamSettings, recipe: CausalRecipe
) -> None:
    """Train (or resume) the transformer of the pipeline folder `start`; export now and then, and at the end.

    Args:
        place: where to run.
        output: pipeline folder to write.
        start: pipeline folder or `samples/...` of the bidirectional model.
        bank: encoded clips.
        settings: the stream that is trained for.
        recipe: length, batch and learning rates.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    pipe = WanPipeline.from_pretrained(check_model(start), dtype=torch.float32).to(place.device)
    model, tokens = pipe.transformer, repertoire_of(pipe.tokenizer).text_tokens
    text = Captioner(pipe.tokenizer, pipe.text_encoder, tokens)
    stock, cross = model.attn_processors, PaddedCrossAttention(tokens)
    model.set_attn_processor({name: cross if "attn2" in name else p for name, p in stock.items()})
    height, width = bank.latents.shape[-2:]
    shift, is_half = pipe.scheduler.config.shift, place.is_half and not place.is_gpu
    teacher = CausalTeacher(model, (height, width), shift, is_half)
    hidden, rest = split_parameters(model, skip=ADAM_PARTS)
    optimizers = [
        (Muon(hidden, weight_decay=DECAY, is_stacked=place.is_gpu, is_half=place.is_half), recipe.rates[0]),
        (torch.optim.AdamW(rest, betas=(0.9, 0.97), weight_decay=0.0), recipe.rates[1]),
    ]
    run = TrainingRun(place, "causal", model, optimizers, recipe.ema, save_every=recipe.save_every)
    kinds = [kind for kind in excerpts(settings, bank.latents.shape[2]) if kind]
    most = max(len(excerpt.chunks) for kind in kinds for excerpt in kind)
    for step, done in run.steps(recipe.pace, lambda *_: export(output, Path(check_model(start)), run.average)):
        excerpt = draw_excerpt(kinds, run.kinds)
        clips = place.team.part(recipe.batch) * (most // len(excerpt.chunks))  # of short excerpts more
        rows = torch.randint(len(bank.captions), (clips,))
        captions = ["" if torch.rand(()) < DROP_CAPTION else bank.captions[row] for row in rows]
        cross.pad_to(choose_padding(1.0, tokens))  # the words are known by now
        with place.precision():
            with torch.no_grad():
                words = text(captions)
            loss = teacher.loss(excerpt, bank.latents[rows].float(), bank.objects[rows], words)
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, linear_rate(step, done))
        run.log("causal", step, done, loss)


def run_causal_stages(place: Place, output: Path, start: str, preset: str, recipe: Recipe, seed: int) -> None:
    """Encode the clips that the model of `start` was taught, and train for the streams of a preset.

    Raises:
        ConfigError: the preset says nothing of streams.
        OutOfTime: the time of this call is over; the next goes on.
    """
    settings, causal = load_preset(preset).stream, recipe.causal
    if settings is None:
        raise ConfigError(f"preset {preset}", "says nothing of streams; give one with a `stream` section")
    pipe = WanPipeline.from_pretrained(check_model(start), dtype=torch.float32)
    recipe = replace(recipe, repertoire=repertoire_of(pipe.tokenizer))
    vae = pipe.vae.to(place.device).eval()
    bank = encode_bank(place, vae, recipe, causal.canvas, causal.clips, causal.encode_batch, seed)
    place.together(train_causal, output, start, bank, settings, causal)


def export(output: Path, start: Path, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a pipeline folder whose other parts are copies of those of `start`."""
    pipe = WanPipeline.from_pretrained(start)
    pipe.transformer.load_state_dict(average)
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_part(pipe.transformer, fresh / "transformer")
    for part in (name for name in pipe.components if (start / name).is_dir() and name != "transformer"):
        shutil.copytree(start / part, fresh / part)
    shutil.copy(start / "model_index.json", fresh)
    replace_parts(fresh, output)


def main(given: Sequence[str] | None = None) -> None:
    """Encode the clips and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=RECIPES, default="grown", help="which recipe")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan-causal"), help="folder of checkpoints")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "tiny-wan-causal", help="folder of the result"
    )
    parser.add_argument("--start", default="samples/tiny-wan", help="pipeline folder of the bidirectional model")
    parser.add_argument("--preset", default="tiny-wan-causal", help="preset whose stream is trained for")
    parser.add_argument("--clips", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--steps", type=int, default=None, help="instead of the recipe's, whatever time they take")
    add_place(parser)
    arguments = parser.parse_args(given)
    recipe = stretch(RECIPES[arguments.size], arguments.stretch)
    causal = replace(recipe.causal, clips=arguments.clips or recipe.causal.clips)
    if arguments.steps is not None:
        causal = replace(causal, pace=Pace(arguments.steps))
    recipe = replace(recipe, causal=causal)
    try:
        run_causal_stages(
            read_place(arguments, recipe), arguments.output, arguments.start, arguments.preset, recipe, arguments.seed
        )
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
