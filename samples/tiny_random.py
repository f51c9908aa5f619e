"""A Wan pipeline with random weights that is made in under a second: for tests and smoke tests, not for looking at."""

from __future__ import annotations

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

from dit_accel.samples.tiny_wan_model import (
    TinyWanSizes,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
)

RANDOM_SIZES = TinyWanSizes(
    heads=2, head_dim=16, layers=2, ffn_dim=32, latent_channels=4, vae_dim=8, text_dim=16, text_layers=1
)


def random_wan_pipeline(seed: int = 0) -> WanPipeline:
    """A complete `WanPipeline` (4x spatial, 2x temporal compression, one token per latent pixel), the same for a seed.

    Args:
        seed: seed of the weights.
    """
    torch.manual_seed(seed)
    tokenizer = make_tokenizer()
    transformer = make_transformer(RANDOM_SIZES)
    torch.nn.init.normal_(transformer.proj_out.weight, std=0.1)
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=make_text_encoder(RANDOM_SIZES, tokenizer).eval(),
        transformer=transformer.eval(),
        vae=make_vae(RANDOM_SIZES).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=RANDOM_SIZES.flow_shift),
    )
