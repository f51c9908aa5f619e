"""Pipelines with random weights of models that have no family of their own: LTX-Video, Qwen-Image, Z-Image."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3Model,
)

from dit_accel.samples.tiny_random.flux import IMAGE_VAE
from dit_accel.samples.tiny_random.text import CHAT, WIDTH, byte_tokenizer, decoder_sizes, mrope_sizes, t5

_CHANNELS = 4
_QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)


def ltx_video() -> LTXPipeline:
    """LTX-Video (4x in space and time): text in a cross-attention, latents that come to the model as tokens."""
    tokenizer = byte_tokenizer("t5", 128)
    halves = (True, True, False, False)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5, spatio_temporal_scaling=halves, decoder_spatio_temporal_scaling=halves,
        patch_size=1,
    )  # fmt: skip
    model = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=WIDTH,
    )  # fmt: skip
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=t5(tokenizer),
        vae=vae,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
    )


def qwen_image() -> QwenImagePipeline:
    """Qwen-Image: text before the image, which comes to the model as tokens with their shape beside them."""
    tokenizer = byte_tokenizer("qwen", 1200, (_QWEN_TEMPLATE, 34), CHAT)
    language: dict[str, Any] = {"model_type": "qwen2_5_vl_text", **mrope_sizes(tokenizer)}
    vision = {
        "depth": 1, "hidden_size": WIDTH, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": WIDTH,
        "patch_size": 2,
    }  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=language, vision_config=vision)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=_CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.0] * _CHANNELS, latents_std=[1.0] * _CHANNELS,
    )  # fmt: skip
    model = QwenImageTransformer2DModel(
        in_channels=4 * _CHANNELS, out_channels=_CHANNELS, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen2_5_VLForConditionalGeneration(config),
        vae=vae,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


def z_image() -> ZImagePipeline:
    """Z-Image: text after the image; the two branches of guidance are one batch of different lengths."""
    tokenizer = byte_tokenizer("qwen", 512, chat=CHAT)
    model = ZImageTransformer2DModel(
        in_channels=_CHANNELS, dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    return ZImagePipeline(
        tokenizer=tokenizer,
        text_encoder=Qwen3Model(Qwen3Config(**decoder_sizes(tokenizer))),
        vae=AutoencoderKL(**IMAGE_VAE, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1),
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
