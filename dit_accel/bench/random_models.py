"""Published transformers with random weights, and the arguments of one forward pass at a preset's size."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.estimate import token_grid
from dit_accel.families.published import published_model
from dit_accel.models import shipped_model
from dit_accel.presets import Preset

_LEVEL = 0.5  # noise level of the step
_TEXT = 512  # text tokens of Wan's cross-attention
_CLIP_TOKENS = 257
_HUNYUAN_15 = (1000, 256, 729)  # prompt, glyph and image tokens

Draw = Callable[..., Tensor]
"""Random tensor of a shape, on the device and in the type of the model."""


@dataclass(frozen=True)
class Blueprint:
    """Class in Diffusers and its arguments."""

    class_name: str
    config: dict[str, Any]


def blueprint_of(preset: Preset) -> Blueprint:
    """The transformer of a preset: from its folder where the model ships with the library, else as published.

    Raises:
        ConfigError: neither.
    """
    home, _, name = preset.repository.partition("/")
    if home != "samples":
        model = published_model(preset.repository)
        return Blueprint(model.class_name, model.config)
    config = json.loads((shipped_model(name) / "transformer" / "config.json").read_text(encoding="utf-8"))
    return Blueprint(config.pop("_class_name"), config)


def make_model(blueprint: Blueprint, layers: int) -> Any:
    """The transformer with `layers` blocks, its lists of blocks shortened alike; weights as the class draws them."""
    import diffusers

    return getattr(diffusers, blueprint.class_name).from_config(shortened(blueprint, layers))


def total_layers(blueprint: Blueprint) -> int:
    """Blocks of the main lists; control blocks follow the number of the others."""
    config = blueprint.config
    return int(config["num_layers"] + config.get("num_single_layers", 0))


def shortened(blueprint: Blueprint, layers: int) -> dict[str, Any]:
    """The config of a model with `layers` blocks in all."""
    config = dict(blueprint.config)
    if "num_single_layers" in config:
        double = max(1, round(layers * config["num_layers"] / total_layers(blueprint)))
        config |= {"num_layers": double, "num_single_layers": layers - double}
    else:
        config["num_layers"] = layers
    if "vace_layers" in config:
        config["vace_layers"] = [index for index in config["vace_layers"] if index < layers]
    return config


def step_arguments(blueprint: Blueprint, preset: Preset, draw: Draw) -> dict[str, Any]:
    """Arguments of `forward` for one guidance branch.

    Args:
        blueprint: the model.
        preset: its size.
        draw: makes the random ones.
    """
    make = _ARGUMENTS[blueprint.class_name]
    return {**make(blueprint.config, preset, draw), "return_dict": False}


def _latents(preset: Preset) -> list[int]:
    """Latent frames, rows and columns."""
    grid = token_grid(preset.model, preset.generation)
    return [size * patch for size, patch in zip(grid, preset.model.patch, strict=True)]


def _wan(config: dict[str, Any], preset: Preset, draw: Draw) -> dict[str, Any]:
    made = {
        "hidden_states": draw(1, config["in_channels"], *_latents(preset)),
        "timestep": draw(1).fill_(1000 * _LEVEL),
        "encoder_hidden_states": draw(1, _TEXT, config["text_dim"]),
    }
    if config.get("image_dim"):
        images = (config.get("pos_embed_seq_len") or _CLIP_TOKENS) // _CLIP_TOKENS
        made["encoder_hidden_states_image"] = draw(images, _CLIP_TOKENS, config["image_dim"])
    if "vace_in_channels" in config:
        made["control_hidden_states"] = draw(1, config["vace_in_channels"], *_latents(preset))
    return made


def _hunyuan_video(config: dict[str, Any], preset: Preset, draw: Draw) -> dict[str, Any]:
    text = preset.model.text_tokens
    made = {
        "hidden_states": draw(1, config["in_channels"], *_latents(preset)),
        "timestep": draw(1).fill_(1000 * _LEVEL),
        "encoder_hidden_states": draw(1, text, config["text_embed_dim"]),
        "encoder_attention_mask": draw(1, text).fill_(1),
        "pooled_projections": draw(1, config["pooled_projection_dim"]),
    }
    return made | ({"guidance": draw(1).fill_(6000.0)} if config["guidance_embeds"] else {})


def _hunyuan_video15(config: dict[str, Any], preset: Preset, draw: Draw) -> dict[str, Any]:
    prompt, glyph, image = _HUNYUAN_15
    images = draw(1, image, config["image_embed_dim"])
    return {
        "hidden_states": draw(1, config["in_channels"], *_latents(preset)),
        "timestep": draw(1).fill_(1000 * _LEVEL),
        "encoder_hidden_states": draw(1, prompt, config["text_embed_dim"]),
        "encoder_attention_mask": draw(1, prompt).fill_(1),
        "encoder_hidden_states_2": draw(1, glyph, config["text_embed_2_dim"]),
        "encoder_attention_mask_2": draw(1, glyph).fill_(1),
        # Text to video is told by an image of zeros.
        "image_embeds": images if config["task_type"] == "i2v" else torch.zeros_like(images),
    }


def _flux(config: dict[str, Any], preset: Preset, draw: Draw) -> dict[str, Any]:
    frames, rows, columns = token_grid(preset.model, preset.generation)
    axes, text = len(config["axes_dims_rope"]), preset.model.text_tokens
    made = {
        "hidden_states": draw(1, frames * rows * columns, config["in_channels"]),
        "timestep": draw(1).fill_(_LEVEL),
        "encoder_hidden_states": draw(1, text, config["joint_attention_dim"]),
        "txt_ids": draw(text, axes).zero_(),
    }
    ids = torch.cartesian_prod(*(torch.arange(n) for n in (frames, rows, columns)))
    made["img_ids"] = draw(len(ids), axes).zero_()
    made["img_ids"][:, :3] = ids.to(made["img_ids"])
    if "pooled_projection_dim" in config:
        made["pooled_projections"] = draw(1, config["pooled_projection_dim"])
    return made | ({"guidance": draw(1).fill_(3.5)} if config.get("guidance_embeds", True) else {})


def _cogvideox(config: dict[str, Any], preset: Preset, draw: Draw) -> dict[str, Any]:
    frames, rows, columns = _latents(preset)
    made: dict[str, Any] = {
        "hidden_states": draw(1, frames, config["in_channels"], rows, columns),
        "timestep": draw(1).fill_(1000 * _LEVEL),
        "encoder_hidden_states": draw(1, preset.model.text_tokens, config["text_embed_dim"]),
    }
    if config.get("use_rotary_positional_embeddings"):
        tokens = int(torch.tensor(token_grid(preset.model, preset.generation)).prod())
        angles = draw(tokens, config["attention_head_dim"])
        made["image_rotary_emb"] = (angles.cos(), angles.sin())
    return made | ({"ofs": draw(1).fill_(2.0)} if config.get("ofs_embed_dim") else {})


_ARGUMENTS: dict[str, Callable[[dict[str, Any], Preset, Draw], dict[str, Any]]] = {
    "WanTransformer3DModel": _wan,
    "WanVACETransformer3DModel": _wan,
    "HunyuanVideoTransformer3DModel": _hunyuan_video,
    "HunyuanVideo15Transformer3DModel": _hunyuan_video15,
    "FluxTransformer2DModel": _flux,
    "Flux2Transformer2DModel": _flux,
    "CogVideoXTransformer3DModel": _cogvideox,
}


def parameters_of(model: nn.Module) -> int:
    """How many there are."""
    return sum(weight.numel() for weight in model.parameters())
