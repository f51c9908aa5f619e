"""HunyuanVideo and HunyuanVideo-1.5 pipelines with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEXT_TEMPLATE
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE as IMAGE_TEMPLATE,
)
from transformers import (
    ByT5Tokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from dit_accel.samples.tiny_random.text import (
    CHAT,
    WIDTH,
    byte_tokenizer,
    clip_images,
    clip_text,
    clip_vision_config,
    decoder_sizes,
    llama,
    mrope_sizes,
    t5,
)

_CHANNELS = 4


def _transformer(**changes: Any) -> HunyuanVideoTransformer3DModel:
    sizes = {
        "in_channels": _CHANNELS, "out_channels": _CHANNELS, "num_attention_heads": 2, "attention_head_dim": 16,
        "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1, "patch_size": 2, "text_embed_dim": WIDTH,
        "pooled_projection_dim": WIDTH, "rope_axes_dim": (4, 6, 6), **changes,
    }  # fmt: skip
    return HunyuanVideoTransformer3DModel(**sizes)


def _parts(template: dict[str, Any]) -> dict[str, Any]:
    """Tokenizers, pooled text encoder, autoencoder (4x spatial, 4x temporal) and scheduler."""
    prefix = str(template["template"]).split("{}")[0]
    words = byte_tokenizer("clip", 77)
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=_CHANNELS, down_block_types=("HunyuanVideoDownBlock3D",) * 3,
        up_block_types=("HunyuanVideoUpBlock3D",) * 3, block_out_channels=(8, 8, 8), layers_per_block=1,
        norm_num_groups=4, spatial_compression_ratio=4, temporal_compression_ratio=4, mid_block_add_attention=False,
    )  # fmt: skip
    return {
        "tokenizer": byte_tokenizer("llama", 1024, (prefix, int(template["crop_start"]))),
        "tokenizer_2": words,
        "text_encoder_2": clip_text(words),
        "vae": vae,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
    }


def hunyuan_video() -> HunyuanVideoPipeline:
    """HunyuanVideo text to video, guidance-distilled."""
    parts = _parts(TEXT_TEMPLATE)
    return HunyuanVideoPipeline(**parts, text_encoder=llama(parts["tokenizer"]), transformer=_transformer())


def hunyuan_video_i2v(condition: str = "token_replace") -> HunyuanVideoImageToVideoPipeline:
    """HunyuanVideo image to video: 576 image tokens go through the language model before the prompt.

    Args:
        condition: "token_replace" (the first latent frame is the image) or "latent_concat" (33-channel variant).
    """
    parts = _parts(IMAGE_TEMPLATE)
    tokenizer = parts["tokenizer"]
    config = LlavaConfig(
        vision_config=clip_vision_config(48),
        text_config={"model_type": "llama", **decoder_sizes(tokenizer)},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    concat = condition == "latent_concat"
    model = _transformer(
        in_channels=2 * _CHANNELS + 1 if concat else _CHANNELS,
        image_condition_type=condition,
        guidance_embeds=not concat,
    )
    return HunyuanVideoImageToVideoPipeline(
        **parts,
        text_encoder=LlavaForConditionalGeneration(config),
        transformer=model,
        image_processor=clip_images(48),
    )


def hunyuan_video_i2v_33ch() -> HunyuanVideoImageToVideoPipeline:
    """HunyuanVideo image to video with the image's latents and a mask as further channels."""
    return hunyuan_video_i2v("latent_concat")


def _parts15() -> dict[str, Any]:
    message = HunyuanVideo15Pipeline._get_mllm_prompt_embeds.__defaults__
    system = next(value for value in message or () if isinstance(value, str))
    prefix = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    tokenizer, glyphs = byte_tokenizer("qwen", 1200, (prefix, 108), CHAT), ByT5Tokenizer()
    vae = AutoencoderKLHunyuanVideo15(
        latent_channels=_CHANNELS, block_out_channels=(8, 8, 8), layers_per_block=1, spatial_compression_ratio=4,
        temporal_compression_ratio=4,
    )  # fmt: skip
    model = HunyuanVideo15Transformer3DModel(
        in_channels=2 * _CHANNELS + 1, out_channels=_CHANNELS, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH, image_embed_dim=WIDTH,
        rope_axes_dim=(4, 6, 6), target_size=32,
    )  # fmt: skip
    with torch.no_grad():
        # Published weights have learned these; zeros at the start would hide what the tokens' kinds do.
        torch.nn.init.normal_(model.cond_type_embed.weight)
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": glyphs,
        "text_encoder": Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**mrope_sizes(tokenizer))),
        "text_encoder_2": t5(glyphs),
        "vae": vae,
        "transformer": model,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=5.0),
        "guider": ClassifierFreeGuidance(guidance_scale=6.0),
    }


def _shorten(pipe: Any) -> Any:
    """Shorter text and fewer image tokens than the 1000, 256 and 729 of the published pipeline, which cost seconds."""
    pipe.tokenizer_max_length, pipe.tokenizer_2_max_length, pipe.vision_num_semantic_tokens = 100, 32, 49
    return pipe


def hunyuan_video15() -> HunyuanVideo15Pipeline:
    """HunyuanVideo-1.5 text to video: two text streams and (empty) image tokens, guidance in separate calls."""
    return _shorten(HunyuanVideo15Pipeline(**_parts15()))


def hunyuan_video15_i2v() -> HunyuanVideo15ImageToVideoPipeline:
    """HunyuanVideo-1.5 image to video: 49 image tokens; the pipeline chooses a size near 32 x 32."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=1, num_attention_heads=2, image_size=14,
        patch_size=2,
    )  # fmt: skip
    return _shorten(
        HunyuanVideo15ImageToVideoPipeline(
            **_parts15(),
            image_encoder=SiglipVisionModel(config),
            feature_extractor=SiglipImageProcessor(size={"height": 14, "width": 14}),
        )
    )
