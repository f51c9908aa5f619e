"""Wan pipelines with random weights: text, image, first-last-frame, VACE, two experts, TI2V."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

from dit_accel.samples.tiny_random.text import WIDTH, byte_tokenizer, clip_vision, t5
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
_CHANNELS = RANDOM_SIZES.latent_channels
# What image-to-video concatenates: the latents, a mask per frame of a latent frame (2), the condition's latents.
_IMAGE_CHANNELS = _CHANNELS + 2 + _CHANNELS


def random_wan_pipeline(seed: int = 0) -> WanPipeline:
    """A `WanPipeline` with the parts of the small trained model (4x spatial, 2x temporal compression, patch 1).

    Args:
        seed: seed of the weights.
    """
    with torch.random.fork_rng(devices=[]):
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


def _sizes(**changes: Any) -> dict[str, Any]:
    return {
        "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": _CHANNELS,
        "out_channels": _CHANNELS, "text_dim": WIDTH, "freq_dim": 16, "ffn_dim": 32, "num_layers": 2,
        "rope_max_seq_len": 64, **changes,
    }  # fmt: skip


def _parts(**changes: Any) -> dict[str, Any]:
    """Everything but the pipeline class; the autoencoder is 2.1's (4x spatial, 2x temporal)."""
    tokenizer = byte_tokenizer("t5", 512)
    vae = AutoencoderKLWan(
        base_dim=8, z_dim=_CHANNELS, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * _CHANNELS, latents_std=[1.0] * _CHANNELS, scale_factor_temporal=2, scale_factor_spatial=4,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer, multilingual=True),
        "vae": vae,
        "scheduler": UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, num_train_timesteps=1000, flow_shift=3.0
        ),
        **changes,
    }


def wan21_t2v() -> WanPipeline:
    """Wan 2.1 text to video."""
    return WanPipeline(**_parts(transformer=WanTransformer3DModel(**_sizes())))


def wan21_i2v(images: int = 1) -> WanImageToVideoPipeline:
    """Wan 2.1 image to video: the image is seen through CLIP (257 tokens per image) and through its latents."""
    encoder, processor = clip_vision(32)
    extra = {"image_dim": WIDTH, "added_kv_proj_dim": 32}
    if images > 1:
        extra["pos_embed_seq_len"] = 257 * images
    model = WanTransformer3DModel(**_sizes(in_channels=_IMAGE_CHANNELS, **extra))
    return WanImageToVideoPipeline(**_parts(transformer=model, image_encoder=encoder, image_processor=processor))


def wan21_flf2v() -> WanImageToVideoPipeline:
    """Wan 2.1 first and last frame to video."""
    return wan21_i2v(images=2)


def wan_vace() -> WanVACEPipeline:
    """Wan VACE: control blocks beside the main ones, fed with video, mask (one channel per pixel) and references."""
    channels = 2 * _CHANNELS + 4 * 4
    model = WanVACETransformer3DModel(**_sizes(num_layers=3, vace_layers=[0, 2], vace_in_channels=channels))
    return WanVACEPipeline(**_parts(transformer=model))


def wan22_t2v() -> WanPipeline:
    """Wan 2.2 A14B text to video: one expert above the noise boundary 0.875, one below it."""
    experts = {"transformer": WanTransformer3DModel(**_sizes()), "transformer_2": WanTransformer3DModel(**_sizes())}
    return WanPipeline(**_parts(**experts, boundary_ratio=0.875))


def wan22_i2v() -> WanImageToVideoPipeline:
    """Wan 2.2 A14B image to video: two experts, boundary 0.9, the image through its latents only."""
    sizes = _sizes(in_channels=_IMAGE_CHANNELS)
    experts = {"transformer": WanTransformer3DModel(**sizes), "transformer_2": WanTransformer3DModel(**sizes)}
    return WanImageToVideoPipeline(**_parts(**experts, boundary_ratio=0.9))


def wan22_ti2v() -> WanPipeline:
    """Wan 2.2 TI2V-5B, text to video: the residual autoencoder and a timestep per token."""
    return WanPipeline(**_ti2v())


def wan22_ti2v_i2v() -> WanImageToVideoPipeline:
    """Wan 2.2 TI2V-5B, image to video: the first latent frame is the image, at timestep 0."""
    return WanImageToVideoPipeline(**_ti2v())


def _ti2v() -> dict[str, Any]:
    return _parts(transformer=WanTransformer3DModel(**_sizes()), vae=make_vae(RANDOM_SIZES), expand_timesteps=True)
