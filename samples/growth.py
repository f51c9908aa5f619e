"""Growing the small Wan pipeline: a wider and deeper one that starts by doing nearly what the trained one does.

As in Net2Net (arXiv 1511.05641), new channels of the hidden state copy old ones, which keeps the means and variances
that its normalisations see; new heads and hidden units are disturbed copies. Nothing reads any of them at first. New
layers are copies of the layer before them that add nothing at first.
"""

from __future__ import annotations

import re

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from dit_accel.samples.tiny_wan_model import TinyWanSizes, make_transformer

_DISTURBED = 0.3  # noise on copied heads and hidden units, in standard deviations of their weights
_UNREAD = 0.02  # noise on what reads new channels, likewise: with none, nothing would ever begin to read them
# What the rows and the columns of each weight of a transformer stand for.
_AXES = {
    r"patch_embedding": ("hidden", ""),
    r"time_embedder\.linear_1|text_embedder\.linear_1": ("embedded", ""),
    r"time_embedder\.linear_2|text_embedder\.linear_2": ("hidden", "embedded"),
    r"time_proj": ("modulation", "hidden"),
    r"attn\d\.to_[qkv]": ("heads", "hidden"),
    r"attn\d\.norm_[qk]": ("heads", ""),
    r"attn\d\.to_out\.0": ("hidden", "heads"),
    r"ffn\.net\.0\.proj": ("units", "hidden"),
    r"ffn\.net\.2": ("hidden", "units"),
    r"norm2": ("hidden", ""),
    r"proj_out": ("", "hidden"),
}
_ADDS = (".to_out.0.", ".net.2.")  # what a layer adds to the hidden state


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
        sizes: none smaller than those of `model`; as many latent channels.
        seed: of what is copied, and of the noise.
    """
    old, grown = model.config, make_transformer(sizes)
    rows = _copied_rows(old.num_attention_heads, old.ffn_dim, sizes, seed)
    generator = torch.Generator().manual_seed(seed)
    weights = spread_layers(model.state_dict(), old.num_layers, sizes.layers)
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


def _copied_rows(heads: int, units: int, sizes: TinyWanSizes, seed: int) -> dict[str, Tensor]:
    width, wider = heads * sizes.head_dim, sizes.heads * sizes.head_dim
    hidden = copied(width, wider, seed=seed)
    return {
        "hidden": hidden,
        "embedded": copied(width, wider, seed=seed + 1),
        "heads": copied(width, wider, sizes.head_dim, seed + 2),
        "units": copied(units, sizes.ffn_dim, seed=seed + 3),
        "modulation": torch.cat([part * width + hidden for part in range(6)]),
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


def spread_layers(weights: dict[str, Tensor], old: int, new: int) -> dict[str, Tensor]:
    """Weights of a transformer of `old` layers, as of one of `new`: new layers copy the one before and add nothing."""
    spread = {name: weight for name, weight in weights.items() if not name.startswith("blocks.")}
    places = [index * old // new for index in range(new)]
    for index, source in enumerate(places):
        is_new = index > 0 and places[index - 1] == source
        for name, weight in weights.items():
            if name.startswith(f"blocks.{source}."):
                adds = is_new and any(part in name for part in _ADDS)
                spread[name.replace(f"blocks.{source}.", f"blocks.{index}.", 1)] = (weight * (not adds)).clone()
    return spread
