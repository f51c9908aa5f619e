"""The parts of the small Wan pipeline, made from nothing: autoencoder, transformer, text encoder and tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models import ModelMixin
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from dit_accel.samples.repertoire import BASIC, Repertoire


@dataclass(frozen=True)
class TinyWanSizes:
    """Sizes of the model.

    Args:
        heads, head_dim, layers, ffn_dim: of the transformer.
        latent_channels: channels of the autoencoder's latents.
        vae_dim: base width of the autoencoder.
        vae_blocks: residual blocks of each of its stages.
        text_dim, text_layers: width and depth of the text encoder.
        flow_shift: shift of the noise schedule, in training and in sampling.
    """

    heads: int = 4
    head_dim: int = 64
    layers: int = 4
    ffn_dim: int = 512
    latent_channels: int = 8
    vae_dim: int = 32
    vae_blocks: int = 1
    text_dim: int = 128
    text_layers: int = 2
    flow_shift: float = 3.0


def make_vae(sizes: TinyWanSizes, mean: list[float] | None = None, std: list[float] | None = None) -> AutoencoderKLWan:
    """Autoencoder with 4x spatial and 2x temporal compression: a 2 x 2 patch, then one residual stage."""
    channels = sizes.latent_channels
    return AutoencoderKLWan(
        base_dim=sizes.vae_dim,
        decoder_base_dim=sizes.vae_dim,
        z_dim=channels,
        dim_mult=[2, 2],
        num_res_blocks=sizes.vae_blocks,
        attn_scales=[],
        temperal_downsample=[True],
        latents_mean=mean or [0.0] * channels,
        latents_std=std or [1.0] * channels,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=2,
        scale_factor_spatial=4,
    )


def make_transformer(sizes: TinyWanSizes) -> WanTransformer3DModel:
    """Transformer with one token per latent pixel, its gates and output near zero at the start."""
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1),
        num_attention_heads=sizes.heads,
        attention_head_dim=sizes.head_dim,
        in_channels=sizes.latent_channels,
        out_channels=sizes.latent_channels,
        text_dim=sizes.text_dim,
        freq_dim=128,
        ffn_dim=sizes.ffn_dim,
        num_layers=sizes.layers,
        rope_max_seq_len=128,
    )
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def make_text_encoder(sizes: TinyWanSizes, tokenizer: PreTrainedTokenizerFast) -> UMT5EncoderModel:
    """A small UMT5 encoder over the words of the captions."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=sizes.text_dim,
        d_kv=32,
        d_ff=2 * sizes.text_dim,
        num_layers=sizes.text_layers,
        num_heads=4,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return UMT5EncoderModel(config)


def make_tokenizer(repertoire: Repertoire = BASIC) -> PreTrainedTokenizerFast:
    """Lower-case words; a word that no caption of the repertoire holds is unknown; every text ends in `</s>`."""
    words = ["<pad>", "</s>", "<unk>", *repertoire.vocabulary]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def save_pipeline(
    folder: Path,
    vae: AutoencoderKLWan,
    transformer: WanTransformer3DModel,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    sizes: TinyWanSizes,
) -> None:
    """Write a folder that `WanPipeline.from_pretrained` loads; large weights as fp16 safetensors."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=sizes.flow_shift)
    # The text encoder is small, and Transformers loads weights in the type they are stored in: it stays fp32.
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer.half(),
        vae=vae.half(),
        scheduler=scheduler,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_part(model: ModelMixin, folder: Path) -> None:
    """Write a model as fp16 safetensors, without the path that it was loaded from."""
    model.half().save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("_name_or_path", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
