"""Growing the small Wan pipeline: a wider and deeper one that starts by doing nearly what the trained one does.

As in Net2Net (arXiv 1511.05641), new channels of the hidden state copy old ones, which keeps the means and variances
that its normalisations see; new heads and hidden units are disturbed copies. Nothing reads any of them at first. New
layers are copies of the layer before them that add nothing at first. New latent channels begin faint.
"""

from __future__ import annotations

import re

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from dit_accel.samples.tiny_wan_model import TinyWanSizes, make_transformer, make_vae

_DISTURBED = 0.3  # noise on copied heads and hidden units, in standard deviations of their weights
_FAINT = 0.3  # of the usual size of random weights, for what encodes and decodes new latent channels
_UNREAD = 0.02  # noise on what reads new channels, likewise: with none, nothing would ever begin to read them
# What the rows and the columns of each weight of a transformer stand for.
_AXES = {
    r"patch_embedding": ("hidden", "latent"),
    r"time_embedder\.linear_1|text_embedder\.linear_1": ("embedded", ""),
    r"time_embedder\.linear_2|text_embedder\.linear_2": ("hidden", "embedded"),
    r"time_proj": ("modulation", "hidden"),
    r"attn\d\.to_[qkv]": ("heads", "hidden"),
    r"attn\d\.norm_[qk]": ("heads", ""),
    r"attn\d\.to_out\.0": ("hidden", "heads"),
    r"ffn\.net\.0\.proj": ("units", "hidden"),
    r"ffn\.net\.2": ("hidden", "units"),
    r"norm2": ("hidden", ""),
    r"proj_out": ("latent", "hidden"),
}
_ADDS = (".to_out.0.", ".net.2.", ".SelfAttention.o.", ".DenseReluDense.wo.")  # what a layer adds to the hidden state


def copied(old: int, new: int, block: int = 1, seed: int = 0) -> Tensor:
    """For each of `new` entries of an axis the one of `old` that it copies: itself, then blocks drawn at random.

    Args:
        old, new: lengths, multiples of `block`.
        block: neighbours that are copied together, as the channels of a head are. Default 1.
        seed: of the draw.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.arange(old).view(-1, block)
    more = [blocks[torch.randperm(len(blocks), generator=generator)] for _ in range(new // old)]
    return torch.cat([blocks, *more]).flatten()[:new]


def grow_transformer(model: WanTransformer3DModel, sizes: TinyWanSizes, seed: int = 0) -> WanTransformer3DModel:
    """A transformer of `sizes` that starts from a smaller `model` of as wide heads.

    Args:
        model: trained, fp32.
        sizes: none smaller than those of `model`.
        seed: of what is copied, and of the noise.
    """
    old, grown = model.config, make_transformer(sizes)
    rows = _copied_rows(old.num_attention_heads, old.ffn_dim, old.in_channels, sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = spread_layers(model.state_dict(), "blocks", old.num_layers, sizes.layers)
    target = grown.state_dict()
    for name, weight in weights.items():
        if name.endswith("scale_shift_table"):
            target[name] = weight[..., rows["hidden"]]
        else:
            out, read = next(axes for pattern, axes in _AXES.items() if re.search(pattern, name))
            target[name] = _widen(weight, target[name], rows.get(out), bool(read), out in _INNER, generator)
    grown.load_state_dict(target)
    return grown


_INNER = ("embedded", "heads", "units")


def _copied_rows(heads: int, units: int, latents: int, sizes: TinyWanSizes, seed: int) -> dict[str, Tensor]:
    width, wider = heads * sizes.head_dim, sizes.heads * sizes.head_dim
    hidden = copied(width, wider, seed=seed)
    return {
        "hidden": hidden,
        "embedded": copied(width, wider, seed=seed + 1),
        "heads": copied(width, wider, sizes.head_dim, seed + 2),
        "units": copied(units, sizes.ffn_dim, seed=seed + 3),
        "modulation": torch.cat([part * width + hidden for part in range(6)]),
        "latent": torch.arange(latents),
    }


def _widen(
    weight: Tensor, fresh: Tensor, rows: Tensor | None, reads: bool, is_disturbed: bool, generator: torch.Generator
) -> Tensor:
    """`weight` in the shape of `fresh`: rows copied, new columns all but unread, rows that copy nothing zero."""
    scale = weight.std()
    made = torch.zeros_like(fresh)
    copies = weight if rows is None else weight[rows]
    if weight.ndim == 1:
        made[: len(copies)] = copies
        return made
    noise = scale * torch.randn(fresh.shape, generator=generator)
    made[: len(copies), : weight.shape[1]] = copies
    if is_disturbed:
        made[len(weight) :, : weight.shape[1]] += _DISTURBED * noise[len(weight) :, : weight.shape[1]]
    if reads:
        made[:, weight.shape[1] :] = _UNREAD * noise[:, weight.shape[1] :]
    return made


def spread_layers(weights: dict[str, Tensor], stem: str, old: int, new: int) -> dict[str, Tensor]:
    """Weights of a stack of `old` layers, as one of `new`: layers in between copy the one before and add nothing."""
    spread = {name: weight for name, weight in weights.items() if f"{stem}." not in name}
    places = [index * old // new for index in range(new)]
    for index, source in enumerate(places):
        is_new = index > 0 and places[index - 1] == source
        for name, weight in weights.items():
            if name.startswith(f"{stem}.{source}."):
                adds = is_new and any(part in name for part in _ADDS)
                spread[name.replace(f"{stem}.{source}.", f"{stem}.{index}.", 1)] = (weight * (not adds)).clone()
    return spread


def grow_text_encoder(
    encoder: UMT5EncoderModel, known: dict[str, int], grown: UMT5EncoderModel, words: dict[str, int]
) -> UMT5EncoderModel:
    """`grown` with the weights of a trained `encoder` of the same width, for more words and with more layers.

    Args:
        encoder: trained.
        known: its words, with their places.
        grown: as initialised; what it is returned as.
        words: its words, with their places; those that `encoder` does not know start at random.
    """
    old, target = encoder.state_dict(), grown.state_dict()
    layers = spread_layers(old, "encoder.block", encoder.config.num_layers, grown.config.num_layers)
    embedded = target["shared.weight"]
    table = torch.randn_like(embedded) * old["shared.weight"].std()
    for word, place in words.items():
        if word in known:
            table[place] = old["shared.weight"][known[word]]
    target.update(layers)
    for name in ("shared.weight", "encoder.embed_tokens.weight"):
        if name in target:
            target[name] = table
    grown.load_state_dict(target)
    return grown


def grow_vae(vae: AutoencoderKLWan, sizes: TinyWanSizes) -> AutoencoderKLWan:
    """An autoencoder of `sizes` with more latent channels that starts by doing nearly what the trained `vae` does.

    Statistics of old channels stay as they are; new ones say that theirs are not known yet: mean 0, deviation 1.
    """
    old, new = vae.config.z_dim, sizes.latent_channels
    more = new - old
    grown = make_vae(sizes, [*vae.config.latents_mean, *[0.0] * more], [*vae.config.latents_std, *[1.0] * more])
    kept = torch.arange(old)
    moments = torch.cat([kept, new + kept])  # means, then logarithms of variances
    target = grown.state_dict()
    for name, weight in vae.state_dict().items():
        fresh, stem = target[name], name.rpartition(".")[0]
        if stem == "encoder.conv_out":
            fresh = _place(weight, _FAINT * fresh, moments, None)
        elif stem == "decoder.conv_in" and weight.ndim > 1:
            fresh = _place(weight, _FAINT * fresh, None, kept)
        elif stem in ("quant_conv", "post_quant_conv"):
            passing = torch.zeros_like(fresh) if fresh.ndim == 1 else torch.eye(len(fresh)).view_as(fresh)
            channels = moments if stem == "quant_conv" else kept
            fresh = _place(weight, passing, channels, channels)
        else:
            fresh = weight
        target[name] = fresh
    grown.load_state_dict(target)
    return grown


def _place(weight: Tensor, among: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """`among` with `weight` at `rows` and, where it has them, `columns`; None stands for all."""
    made = among.clone()
    rows = torch.arange(len(among)) if rows is None else rows
    if weight.ndim == 1:
        made[rows] = weight
    else:
        columns = torch.arange(among.shape[1]) if columns is None else columns
        made[rows[:, None], columns] = weight
    return made
