"""Grow a trained small Wan pipeline to the full size: `python samples/grow_tiny_wan.py --model FOLDER`.

The larger model begins with what the smaller one knows (`growth`), and goes on with captions of both repertoires: less
work than a training from nothing, where there is only a processor. A killed run resumes from the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from dit_accel.models import check_model
from dit_accel.samples.growth import grow_text_encoder, grow_transformer, grow_vae
from dit_accel.samples.tiny_wan_flow import Start, train_transformer
from dit_accel.samples.tiny_wan_model import make_text_encoder, make_tokenizer
from dit_accel.samples.tiny_wan_recipes import GROWN, Pace, Recipe
from dit_accel.samples.tiny_wan_run import OutOfTime, Place
from dit_accel.samples.tiny_wan_vae import encode_bank, fit_vae, latent_statistics, load_vae
from dit_accel.samples.train_tiny_wan import UNFINISHED, add_place, read_place


def start_from(model: Path, recipe: Recipe) -> Start:
    """The transformer and the text encoder of a pipeline folder, grown to the sizes of `recipe`."""
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer", dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    known, tokenizer = AutoTokenizer.from_pretrained(model / "tokenizer"), make_tokenizer(recipe.repertoire)
    fresh = make_text_encoder(recipe.sizes, tokenizer)
    words = tokenizer.get_vocab()
    return grow_transformer(transformer, recipe.sizes), grow_text_encoder(encoder, known.get_vocab(), fresh, words)


def train_grown_vae(place: Place, model: Path, recipe: Recipe, seed: int) -> AutoencoderKLWan:
    """Grow and train (or resume, or load) the autoencoder; latents of old channels stay about what they were.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    finished = place.work / "vae.json"
    if finished.exists():
        return load_vae(place.work, recipe.sizes).to(place.device).eval()
    trained = AutoencoderKLWan.from_pretrained(model / "vae", dtype=torch.float32).to(place.device).eval()
    vae = grow_vae(trained, recipe.sizes).to(place.device)
    fit_vae(vae, place, recipe, seed, teacher=trained)
    mean, std = latent_statistics(vae.eval(), recipe.repertoire, seed)
    old = trained.config.z_dim
    mean, std = [*trained.config.latents_mean, *mean[old:]], [*trained.config.latents_std, *std[old:]]
    save_file({name: value.cpu() for name, value in vae.state_dict().items()}, place.work / "vae.safetensors")
    finished.write_text(json.dumps({"mean": mean, "std": std}))
    return train_grown_vae(place, model, recipe, seed)


def main(given: Sequence[str] | None = None) -> None:
    """Run all stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="samples/tiny-wan", help="pipeline folder to begin with")
    parser.add_argument("--work", type=Path, default=Path("work/grown"), help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, default=Path("outputs/tiny-wan-grown"), help="folder of the result")
    parser.add_argument("--vae-steps", type=int, default=None, help="instead of the recipe's")
    parser.add_argument("--steps", type=int, default=None, help="of the transformer, likewise")
    add_place(parser)
    arguments = parser.parse_args(given)
    recipe, model = GROWN, Path(check_model(arguments.model))
    if arguments.vae_steps is not None:
        recipe = replace(recipe, vae=replace(recipe.vae, pace=Pace(arguments.vae_steps)))
    if arguments.steps is not None:
        recipe = replace(recipe, flow=replace(recipe.flow, pace=Pace(arguments.steps)))
    place, flow, seed = read_place(arguments, recipe), recipe.flow, arguments.seed
    try:
        vae = train_grown_vae(place, model, recipe, seed)
        bank = encode_bank(place, vae, recipe, flow.canvas, flow.clips, flow.encode_batch, seed)
        train_transformer(place, arguments.output, recipe, bank, seed, start_from(model, recipe))
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)


if __name__ == "__main__":
    main()
