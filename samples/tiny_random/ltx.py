"""LTX-Video and LTX-2 pipelines with random weights: models that have no family of their own."""

from __future__ import annotations

from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from dit_accel.samples.tiny_random.text import WIDTH, byte_tokenizer, decoder_sizes, t5

_MEL = 8  # bands of the audio spectrogram; its autoencoder compresses them 4x


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


def ltx2() -> LTX2Pipeline:
    """LTX-2 (4x in space and time): video and audio in one model, and three calls per step with its own guidance."""
    tokenizer = byte_tokenizer("t5", 128)
    layers = 2
    vision = {
        "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    encoder = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=decoder_sizes(tokenizer, layers), vision_config=vision, mm_tokens_per_image=4)
    )
    sizes = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    connectors = LTX2TextConnectors(
        caption_channels=WIDTH, text_proj_in_factor=layers + 1, connector_rope_base_seq_len=128,
        rope_double_precision=False,
        **{f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in sizes.items()},
    )  # fmt: skip
    return LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05),
        vae=_video_vae(),
        audio_vae=_audio_vae(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        connectors=connectors,
        transformer=_audio_video_transformer(),
        vocoder=LTX2Vocoder(
            in_channels=2 * _MEL, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
            resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]], output_sampling_rate=16000,
        ),
    )  # fmt: skip


def _audio_video_transformer() -> LTX2VideoTransformer3DModel:
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    return LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, audio_in_channels=_MEL // 2, audio_out_channels=_MEL // 2, num_layers=2,
        caption_channels=WIDTH, vae_scale_factors=(4, 4, 4), rope_double_precision=False, **sizes,
        **{f"audio_{key}": value for key, value in sizes.items()},
    )  # fmt: skip


def _video_vae() -> AutoencoderKLLTX2Video:
    return AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8, 8), down_block_types=("LTX2VideoDownBlock3D",) * 2,
        decoder_block_out_channels=(8, 8), layers_per_block=(1,) * 3, decoder_layers_per_block=(1,) * 3,
        spatio_temporal_scaling=(True,) * 2, decoder_spatio_temporal_scaling=(True,) * 2,
        decoder_inject_noise=(False,) * 3, downsample_type=("spatiotemporal",) * 2,
        upsample_type=("spatiotemporal",) * 2, upsample_residual=(False,) * 2, upsample_factor=(1, 1), patch_size=1,
    )  # fmt: skip


def _audio_vae() -> AutoencoderKLLTX2Audio:
    return AutoencoderKLLTX2Audio(
        base_channels=4, ch_mult=(1,), num_res_blocks=1, latent_channels=2, resolution=32, mel_bins=_MEL,
    )  # fmt: skip
