"""Image pipelines with random weights of models that have no family of their own: Qwen-Image, Z-Image."""

from __future__ import annotations

from typing import Any

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
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
from dit_accel.samples.tiny_random.text import CHAT, WIDTH, byte_tokenizer, decoder_sizes, mrope_sizes

_CHANNELS = 4
_QWEN_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
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
