"""HunyuanVideo-1.5: double blocks only; image, glyph and prompt tokens after the video, their padding last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.families.base import (
    AccelProcessor,
    AttentionLayer,
    Family,
    ForwardGeometry,
    block_layers,
    patch_grid,
)
from dit_accel.families.registry import register_family


class HunyuanVideo15JointAttention(AccelProcessor):
    """Joint attention of HunyuanVideo-1.5 blocks: the stock projections, norms and rotary embedding around `attend`.

    Diffusers expands the padding to a mask of all pairs of tokens. Here it is a valid length per batch item, and when
    the lengths agree the padded keys are cut off, so that dense attention needs no mask at all.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend the video `[B, N, C]` and the text `[B, M, C]` to each other; padding text is never attended."""
        video = hidden_states.shape[1]
        stream = [proj(hidden_states).unflatten(2, (attn.heads, -1)) for proj in (attn.to_q, attn.to_k, attn.to_v)]
        stream[:2] = attn.norm_q(stream[0]), attn.norm_k(stream[1])
        if image_rotary_emb is not None:
            stream[:2] = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in stream[:2])
        projections = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
        words = [proj(encoder_hidden_states).unflatten(2, (attn.heads, -1)) for proj in projections]
        words[:2] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(stream, words, strict=True))
        out = self.attend_joint(attn, query, key, value, attention_mask, "after", mask_is_length=True)
        hidden, text = out[:, :video], out[:, video:]
        return attn.to_out[1](attn.to_out[0](hidden)), attn.to_add_out(text)

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention. All `[B, N, H, D]`; `mask` `[B, M]` says which of the text tokens at the end are valid."""
        state = self.engine.state
        if mask is None or state is None or state.text_valid is None:
            return super().dense(query, key, value)
        padding, shortest = mask.shape[1] - max(state.text_valid), min(state.text_valid)
        key, value, mask = (x[:, : x.shape[1] - padding] for x in (key, value, mask))
        if shortest == mask.shape[1]:
            return super().dense(query, key, value)
        video = mask.new_ones(len(mask), key.shape[1] - mask.shape[1])
        valid = torch.cat([video, mask], dim=1).bool()
        return super().dense(query, key, value, valid[:, None, None])


@register_family
class HunyuanVideo15Family(Family):
    """`HunyuanVideo15Transformer3DModel`: HunyuanVideo-1.5 text and image to video."""

    name = "hunyuan-video-1.5"
    transformer_classes = ("HunyuanVideo15Transformer3DModel",)
    stock_processors = ("HunyuanVideo15AttnProcessor2_0",)

    def layers(self, model: Any) -> list[AttentionLayer]:
        """`attn` of every block."""
        return block_layers(model, "transformer_blocks", "attn", "joint")

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """One shared `HunyuanVideo15JointAttention`."""
        return HunyuanVideo15JointAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Latents `[B, C, F, H, W]` and patch sizes give the grid; the two text masks and the image tokens a length.

        The model moves valid tokens to the front. It takes image tokens for absent when all of them are zero.
        """
        latents, image = arguments["hidden_states"], arguments["image_embeds"]
        patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        words = arguments["encoder_attention_mask"].bool().sum(1) + arguments["encoder_attention_mask_2"].bool().sum(1)
        seen = image.shape[1] if bool((image != 0).any()) else 0
        valid = tuple(int(n) + seen for n in words.tolist())
        return ForwardGeometry(patch_grid(latents, patch), latents.shape[0], arguments["timestep"], text_valid=valid)
