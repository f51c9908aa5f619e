"""FLUX.1 and FLUX.2 pipelines with random weights."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
)
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, Qwen3Config, Qwen3ForCausalLM

from dit_accel.samples.tiny_random.text import CHAT, WIDTH, byte_tokenizer, clip_text, decoder_sizes, t5

_CHANNELS = 4
_PACKED = 4 * _CHANNELS  # channels of a token: 2 x 2 latent pixels
IMAGE_VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 8), "layers_per_block": 1, "latent_channels": _CHANNELS, "norm_num_groups": 4,
}  # fmt: skip
MISTRAL_CHAT = (
    "{% for m in messages %}[{{ m.role }}]{% for part in m.content %}{{ part.text }}{% endfor %}"
    "[/{{ m.role }}]{% endfor %}"
)


def _flux1(guidance: bool, in_channels: int = _PACKED) -> dict[str, Any]:
    """All parts of a FLUX.1 pipeline; the autoencoder compresses 2x."""
    words, pieces = byte_tokenizer("clip", 77), byte_tokenizer("t5", 512)
    model = FluxTransformer2DModel(
        in_channels=in_channels, out_channels=_PACKED, num_layers=2, num_single_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=guidance,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return {
        "tokenizer": words,
        "text_encoder": clip_text(words),
        "tokenizer_2": pieces,
        "text_encoder_2": t5(pieces),
        "vae": AutoencoderKL(**IMAGE_VAE, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        "transformer": model,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance),
    }


def flux1_dev() -> FluxPipeline:
    """FLUX.1 dev: guidance-distilled."""
    return FluxPipeline(**_flux1(guidance=True))


def flux1_schnell() -> FluxPipeline:
    """FLUX.1 schnell: timestep-distilled, without guidance."""
    return FluxPipeline(**_flux1(guidance=False))


def flux1_kontext() -> FluxKontextPipeline:
    """FLUX.1 Kontext: the tokens of a reference image follow those of the image."""
    return FluxKontextPipeline(**_flux1(guidance=True))


def flux1_fill() -> FluxFillPipeline:
    """FLUX.1 Fill: the masked image's latents and the mask (one channel per pixel) are further channels."""
    return FluxFillPipeline(**_flux1(guidance=True, in_channels=2 * _PACKED + 4 * 2**2))


def _flux2(text_dim: int, guidance: bool) -> dict[str, Any]:
    model = Flux2Transformer2DModel(
        in_channels=_PACKED, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=text_dim, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance,
    )  # fmt: skip
    return {
        "vae": AutoencoderKLFlux2(**IMAGE_VAE),
        "transformer": model,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }


def flux2_dev() -> Flux2Pipeline:
    """FLUX.2 dev: the prompt is three hidden states (10, 20, 30) of a language model, hence its 31 thin layers."""
    tokenizer = byte_tokenizer("llama", 1024, chat=MISTRAL_CHAT)
    vision = {
        "model_type": "pixtral", "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 4,
    }  # fmt: skip
    language = {"model_type": "mistral", **decoder_sizes(tokenizer, layers=31)}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(vision_config=vision, text_config=language))
    return Flux2Pipeline(tokenizer=tokenizer, text_encoder=encoder, **_flux2(3 * WIDTH, guidance=True))


def flux2_klein() -> Flux2KleinPipeline:
    """FLUX.2 klein: hidden states 9, 18 and 27 of a Qwen3, no guidance embedding."""
    tokenizer = byte_tokenizer("qwen", 1024, chat=CHAT)
    encoder = Qwen3ForCausalLM(Qwen3Config(**decoder_sizes(tokenizer, layers=28)))
    parts = _flux2(3 * WIDTH, guidance=False)
    return Flux2KleinPipeline(tokenizer=tokenizer, text_encoder=encoder, **parts, is_distilled=False)
