"""A small model that is grown to a larger one: what its training starts with, see `growth`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import save_file
from transformers import UMT5EncoderModel

from dit_accel.samples.growth import grow_transformer
from dit_accel.samples.tiny_wan_flow import Start
from dit_accel.samples.tiny_wan_recipes import Recipe
from dit_accel.samples.tiny_wan_run import Place
from dit_accel.samples.tiny_wan_vae import load_vae


def start_from(model: Path, recipe: Recipe) -> Start:
    """The transformer of a pipeline folder, grown to the sizes of `recipe`, and its text encoder as it is."""
    transformer = WanTransformer3DModel.from_pretrained(model / "transformer", dtype=torch.float32)
    encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
    return grow_transformer(transformer, recipe.sizes), encoder.requires_grad_(False)


def take_vae(place: Place, model: Path, recipe: Recipe) -> AutoencoderKLWan:
    """The autoencoder of a pipeline folder, which the grown model shares, left in the work folder for the export."""
    vae = AutoencoderKLWan.from_pretrained(model / "vae", dtype=torch.float32)
    save_file(vae.state_dict(), place.work / "vae.safetensors")
    statistics = {"mean": vae.config.latents_mean, "std": vae.config.latents_std}
    (place.work / "vae.json").write_text(json.dumps(statistics))
    return load_vae(place.work, recipe.sizes).to(place.device).eval()
