"""FLUX.1: text before the image; double blocks with projections of their own for text, single blocks without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.families.base import AccelProcessor, AttentionLayer, Family, ForwardGeometry
from dit_accel.families.registry import register_family


def _project(attn: Any, hidden: Tensor, text: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v `[B, N, H, D]` of the image (or joint) stream, and of the text stream where it has its own."""
    has_text = text is not None and attn.added_kv_proj_dim is not None
    if attn.fused_projections:
        image = list(attn.to_qkv(hidden).chunk(3, dim=-1))
        words = list(attn.to_added_qkv(text).chunk(3, dim=-1)) if has_text else []
    else:
        image = [attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)]
        words = [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)] if has_text else []
    image, words = ([x.unflatten(-1, (-1, attn.head_dim)) for x in stream] for stream in (image, words))
    image[:2] = attn.norm_q(image[0]), attn.norm_k(image[1])
    if words:
        words[:2] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
    return image, words


class FluxJointAttention(AccelProcessor):
    """Joint attention of FLUX blocks: the stock projections, norms and rotary embedding around `engine.attend`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend `hidden_states` `[B, N, C]` with the text `[B, M, C]`; single blocks pass both in `hidden_states`."""
        self.refuse_parallel()
        image, words = _project(attn, hidden_states, encoder_hidden_states)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(words, image, strict=True)) if words else image
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)
        out = self.attend_joint(attn, query, key, value, attention_mask, "before")
        if encoder_hidden_states is None:
            return out
        text, hidden = out.split_with_sizes([words[0].shape[1], hidden_states.shape[1]], dim=1)
        hidden = attn.to_out[1](attn.to_out[0](hidden.contiguous()))
        return hidden, attn.to_add_out(text.contiguous())


@register_family
class FluxFamily(Family):
    """`FluxTransformer2DModel`: FLUX.1 dev, schnell, Fill. With reference tokens (Kontext), all
    image tokens are taken as one row."""

    name = "flux"
    transformer_classes = ("FluxTransformer2DModel",)
    stock_processors = ("FluxAttnProcessor",)

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Double blocks, then single blocks."""
        double = [
            AttentionLayer(f"transformer_blocks.{i}.attn", b.attn) for i, b in enumerate(model.transformer_blocks)
        ]
        single = enumerate(model.single_transformer_blocks)
        return double + [AttentionLayer(f"single_transformer_blocks.{i}.attn", b.attn) for i, b in single]

    def processor(self, role: str, engine: Engine) -> Callable[..., Any]:
        """One shared `FluxJointAttention`."""
        return FluxJointAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """The position ids (reference, row, column) of the image tokens give the grid; timesteps lie in [0, 1]."""
        ids, (batch, tokens, _) = arguments["img_ids"], arguments["hidden_states"].shape
        ids = ids[0] if ids.ndim == 3 else ids
        height, width = (int(n) + 1 for n in ids[:, 1:].amax(0).tolist())
        grid = (1, height, width) if height * width == tokens else (1, 1, tokens)
        return ForwardGeometry(grid, batch, arguments["timestep"], timestep_scale=1.0)
