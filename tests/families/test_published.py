"""Every published model on the meta device: layers, token counts, and a state dict under its published names."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders import single_file_utils

import dit_accel
from dit_accel.estimate import token_layout
from dit_accel.families.published import published_models
from dit_accel.families.registry import family_of
from dit_accel.layout import TokenLayout
from dit_accel.presets import list_presets, load_preset

HERE = Path(__file__).parent
MODELS = {model.name: asdict(model) | {"class": model.class_name} for model in published_models()}
KEYS = json.loads((HERE / "published_keys.json").read_text())
CONVERTERS = {
    "wan": single_file_utils.convert_wan_transformer_to_diffusers,
    "hunyuan-video": single_file_utils.convert_hunyuan_video_transformer_to_diffusers,
    "flux": single_file_utils.convert_flux_transformer_checkpoint_to_diffusers,
    "flux2": single_file_utils.convert_flux2_transformer_checkpoint_to_diffusers,
}
# Video and text tokens at a size (height, frames), as papers and model cards give them.
TOKENS = {
    ("wan2.1-t2v-14b", 720, 81): (75_600, 0),
    ("wan2.1-t2v-1.3b", 480, 81): (32_760, 0),
    ("wan2.2-ti2v-5b", 704, 121): (27_280, 0),
    ("hunyuan-video", 720, 129): (118_800, 256),
    ("cogvideox-5b", 480, 49): (17_550, 226),
    ("cogvideox-2b", 480, 49): (17_550, 226),
    ("cogvideox1.5-5b", 768, 81): (44_880, 226),
    ("flux1-dev", 1024, 1): (4_096, 512),
    ("flux1-schnell", 1024, 1): (4_096, 256),
    ("flux1-kontext-dev", 1024, 2): (8_192, 512),
    ("flux2-dev", 1024, 1): (4_096, 512),
    ("hunyuan-video-1.5-480p-t2v", 480, 121): (49_290, 1_985),
}


# Presets at sizes that the models' own pages do not name.
ELSEWHERE = {
    "flux1-dev-2k", "flux1-dev-4k",
    "hunyuan-video-1.5-t2v-480p", "hunyuan-video-1.5-i2v-480p",  # 480 x 832, where the published bucket is 480 x 848
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_every_config_says_where_it_was_read(name):
    files = re.findall(r"[\w/.-]+\.(?:py|yaml)\b", MODELS[name]["source"])
    commits = re.findall(r" of [\w-]+/\w+ at [0-9a-f]{12}\b", MODELS[name]["source"])
    assert files
    assert len(commits) == MODELS[name]["source"].count("; ") + 1 - ("task_type:" in MODELS[name]["source"])


@cache
def make(name):
    model = MODELS[name]
    with torch.device("meta"):
        return getattr(diffusers, model["class"]).from_config(model["config"])


def position(name):
    return "none" if name.startswith("wan") else "after" if name.startswith("hunyuan") else "before"


@pytest.mark.parametrize("name", MODELS)
def test_layers_are_all_the_self_attention_in_their_published_numbers(name):
    transformer, expected = make(name), MODELS[name]["layers"]
    billions = sum(p.numel() for p in transformer.parameters()) / 1e9
    assert billions == pytest.approx(MODELS[name]["billions"], rel=0.03)
    layers = [layer.name for layer in family_of(transformer).layers(transformer)]
    attention = {"attn1", "attn"}
    assert [layer.rsplit(".", 1)[0] for layer in layers] == [
        f"{blocks}.{i}" for blocks, count in expected.items() for i in range(count)
    ]
    assert {layer.rsplit(".", 1)[1] for layer in layers} <= attention
    before = {name: module.processor for name, module in transformer.named_modules() if hasattr(module, "processor")}
    with dit_accel.accelerate(transformer, method="radial"):
        changed = {
            key for key, processor in before.items() if transformer.get_submodule(key).processor is not processor
        }
    assert changed == set(layers)
    # What is left alone is cross-attention and text refiners.
    assert all("attn2" in key or "context_embedder" in key for key in set(before) - changed)


def arguments(model, size):
    """Arguments of a forward pass at `size`, on the meta device where their values do not matter."""
    height, width, frames, _ = size
    (space, time), config, text = model["vae"], model["config"], model["text"]
    values = {"timestep": torch.tensor([500.0])}
    if model["class"].startswith("Flux"):
        rows, columns = height // (2 * space), width // (2 * space)
        ids = torch.cartesian_prod(torch.arange(float(frames)), torch.arange(float(rows)), torch.arange(float(columns)))
        values["hidden_states"] = torch.empty(1, len(ids), config["in_channels"], device="meta")
        return values | {
            "img_ids": torch.cat([ids, ids.new_zeros(len(ids), 1)], 1)[:, : 3 + ("2" in model["class"][4:5])]
        }
    latent = [(frames - 1) // time + 1, height // space, width // space]
    if model["class"].startswith("CogVideoX"):
        latent[0] += latent[0] % (config.get("patch_size_t") or 1)  # the pipeline pads to whole patches
        return values | {"hidden_states": torch.empty(1, latent[0], 16, *latent[1:], device="meta")}
    values["hidden_states"] = torch.empty(1, config["in_channels"], *latent, device="meta")
    if model["class"] == "HunyuanVideoTransformer3DModel":
        values["encoder_attention_mask"] = torch.ones(1, text)
    elif model["class"].startswith("HunyuanVideo15"):
        values |= {"encoder_attention_mask": torch.ones(1, 1000), "encoder_attention_mask_2": torch.ones(1, 256)}
        values["image_embeds"] = torch.ones(1, 729, 1152)
    return values


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_the_published_sizes(name):
    model, transformer = MODELS[name], make(name)
    for size in model["sizes"]:
        geometry = family_of(transformer).read(transformer, arguments(model, size))
        assert list(geometry.grid) == size[3]
        layout = TokenLayout(geometry.grid, model["text"], position(name))
        assert layout.tokens == layout.video + model["text"]
        assert geometry.text_valid in (None, (model["text"],))
        known = TOKENS.get((name, size[0], size[2]))
        assert known in (None, (layout.video, layout.text))


def test_the_table_of_token_counts_names_published_sizes():
    sizes = {(name, size[0], size[2]) for name, model in MODELS.items() for size in model["sizes"]}
    assert set(TOKENS) <= sizes


def feed_forward(config):
    """Width of the feed-forward layers, as presets count it: a gated one as 3/2 of its width."""
    if "ffn_dim" in config:
        return config["ffn_dim"]
    inner = config["num_attention_heads"] * config["attention_head_dim"]
    gated = "timestep_guidance_channels" in config  # FLUX.2
    return int(inner * config.get("mlp_ratio", 4.0) * (1.5 if gated else 1.0))


@pytest.mark.parametrize("name", [n for n in list_presets() if "/" not in n and not n.startswith("tiny-wan")])
def test_presets_say_of_a_model_what_was_published(name):
    preset = load_preset(name)
    (model,) = [m for m in MODELS.values() if m["repository"] == preset.repository]
    facts, config = preset.model, model["config"]
    assert facts.layers == sum(model["layers"].values())
    assert facts.heads == config["num_attention_heads"]
    assert facts.head_dim == config["attention_head_dim"]
    assert facts.ffn_dim == feed_forward(config)
    assert [facts.vae_spatial, facts.vae_temporal] == list(model["vae"]) or preset.makes_image
    layout = token_layout(facts, preset.generation)
    assert layout.text == model["text"]
    assert layout.text_position == position(model["name"]) or not layout.text
    assert list(layout.grid) in [size[3] for size in model["sizes"]] or name in ELSEWHERE


def expand(pattern, counts):
    """All names that `pattern` stands for."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [
        [part] if i % 2 == 0 else part.split("|") if "|" in part else [str(n) for n in range(counts[part])]
        for i, part in enumerate(parts)
    ]
    return ["".join(choice) for choice in itertools.product(*choices)]


def shape(expression, sizes):
    """A shape such as "6*d,128"."""
    numbers = [[int(f) if f.isdigit() else sizes[f] for f in axis.split("*")] for axis in expression.split(",")]
    return [math.prod(axis) for axis in numbers]


def published_state_dict(model):
    config = model["config"]
    counts = {
        "blocks": config["num_layers"],
        "singles": config.get("num_single_layers", 0),
        "refiners": config.get("num_refiner_layers", 0),
        "vace": len(config.get("vace_layers", [])),
    }
    sizes = {
        "d": config["num_attention_heads"] * config["attention_head_dim"],
        "f": config.get("ffn_dim", 0),
        "channels": config["in_channels"],
        "out": config.get("out_channels", config["in_channels"]),
        "text": config.get("joint_attention_dim", 0),
    }
    return {
        name: torch.empty(shape(expression, sizes), device="meta")
        for group in model["keys"]
        for pattern, expression in KEYS[group].items()
        for name in expand(pattern, counts)
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_state_dict_with_published_names_loads_into_the_accelerated_model(name):
    model, transformer = MODELS[name], make(name)
    state = published_state_dict(model)
    convert = CONVERTERS.get(model["keys"][0])
    converted = state if convert is None else convert(dict(state))
    with dit_accel.accelerate(transformer, method="radial"):
        transformer.load_state_dict(converted, strict=True, assign=True)
