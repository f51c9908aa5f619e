"""CogVideoX pipelines with random weights: 2B, 5B and 1.5, text and image to video."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)

from dit_accel.samples.tiny_random.text import WIDTH, byte_tokenizer, t5

_CHANNELS = 4


def _parts(scheduler: Any, **changes: Any) -> dict[str, Any]:
    """All parts; the autoencoder compresses 4x in space and time, and a sample is 9 frames of 32 x 48 pixels."""
    tokenizer = byte_tokenizer("t5", 226)
    sizes = {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": _CHANNELS, "out_channels": _CHANNELS,
        "time_embed_dim": 8, "text_embed_dim": WIDTH, "num_layers": 2, "sample_height": 8, "sample_width": 12,
        "sample_frames": 9, **changes,
    }  # fmt: skip
    vae = AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 3, up_block_types=("CogVideoXUpBlock3D",) * 3,
        block_out_channels=(8, 8, 8), latent_channels=_CHANNELS, layers_per_block=1, norm_num_groups=4,
        temporal_compression_ratio=4, sample_height=32, sample_width=48, invert_scale_latents="ofs_embed_dim" in sizes,
    )  # fmt: skip
    return {
        "tokenizer": tokenizer,
        "text_encoder": t5(tokenizer),
        "vae": vae,
        "transformer": CogVideoXTransformer3DModel(**sizes),
        "scheduler": scheduler(
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
            prediction_type="v_prediction",
        ),
    }


_ROTARY: dict[str, Any] = {"use_rotary_positional_embeddings": True}
_NEWER: dict[str, Any] = {**_ROTARY, "patch_size_t": 2, "patch_bias": False}


def cogvideox_2b() -> CogVideoXPipeline:
    """CogVideoX 2B: fixed sine embeddings of the positions."""
    return CogVideoXPipeline(**_parts(CogVideoXDDIMScheduler))


def cogvideox_5b() -> CogVideoXPipeline:
    """CogVideoX 5B: rotary embeddings."""
    return CogVideoXPipeline(**_parts(CogVideoXDPMScheduler, **_ROTARY))


def cogvideox_5b_i2v() -> CogVideoXImageToVideoPipeline:
    """CogVideoX 5B image to video: the image's latents as further channels, learned and rotary embeddings."""
    extra = {"in_channels": 2 * _CHANNELS, "use_learned_positional_embeddings": True}
    return CogVideoXImageToVideoPipeline(**_parts(CogVideoXDPMScheduler, **_ROTARY, **extra))


def cogvideox15_5b() -> CogVideoXPipeline:
    """CogVideoX 1.5: patches of two frames."""
    return CogVideoXPipeline(**_parts(CogVideoXDPMScheduler, **_NEWER))


def cogvideox15_5b_i2v() -> CogVideoXImageToVideoPipeline:
    """CogVideoX 1.5 image to video: patches of two frames and an embedded `ofs` value."""
    extra = {"in_channels": 2 * _CHANNELS, "ofs_embed_dim": 8}
    return CogVideoXImageToVideoPipeline(**_parts(CogVideoXDPMScheduler, **_NEWER, **extra))
