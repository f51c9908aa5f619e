"""A small model that is grown to a larger one: what its training starts with, see `growth`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import AutoTokenizer, UMT5EncoderModel

from dit_accel.samples.growth import grow_text_encoder, grow_transformer, grow_vae
from dit_accel.samples.tiny_wan_flow import Start
from dit_accel.samples.tiny_wan_model import make_text_encoder, make_tokenizer
from dit_accel.samples.tiny_wan_recipes import Recipe
from dit_accel.samples.tiny_wan_run import Place
from dit_accel.samples.tiny_wan_vae import fit_vae, latent_statistics, load_vae


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
    place.together(fit_vae, vae, recipe, seed, trained)
    mean, std = latent_statistics(vae.eval(), recipe.repertoire, seed)
    old = trained.config.z_dim
    mean, std = [*trained.config.latents_mean, *mean[old:]], [*trained.config.latents_std, *std[old:]]
    save_file({name: value.cpu() for name, value in vae.state_dict().items()}, place.work / "vae.safetensors")
    finished.write_text(json.dumps({"mean": mean, "std": std}))
    return train_grown_vae(place, model, recipe, seed)
