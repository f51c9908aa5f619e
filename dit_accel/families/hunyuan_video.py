"""HunyuanVideo: text after the video, its padding last; double blocks, then single blocks."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.families.base import (
    AttentionLayer,
    Family,
    ForwardGeometry,
    TokenPorts,
    block_layers,
    patch_grid,
)
from dit_accel.families.processor import AccelProcessor, AttentionInputs
from dit_accel.families.registry import register_family


class HunyuanVideoJointAttention(AccelProcessor):
    """Joint attention of HunyuanVideo blocks: the stock projections, norms and rotary embedding around `attend`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend the video `[B, N, C]` and the text `[B, M, C]` to each other; padding text is never attended."""
        video, has_own = hidden_states.shape[1], attn.add_q_proj is not None
        source = hidden_states if has_own else torch.cat([hidden_states, encoder_hidden_states], dim=1)
        stream = [x.unflatten(2, (attn.heads, -1)) for x in (attn.to_q(source), attn.to_k(source), attn.to_v(source))]
        stream[:2] = _norm(attn.norm_q, stream[0]), _norm(attn.norm_k, stream[1])
        if image_rotary_emb is not None:
            for i, x in enumerate(stream[:2]):
                turned = apply_rotary_emb(x[:, :video], image_rotary_emb, sequence_dim=1)
                stream[i] = torch.cat([turned, x[:, video:]], dim=1)
        if has_own:
            words = [proj(encoder_hidden_states) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            words = [x.unflatten(2, (attn.heads, -1)) for x in words]
            words[:2] = _norm(attn.norm_added_q, words[0]), _norm(attn.norm_added_k, words[1])
            stream = [torch.cat(pair, dim=1) for pair in zip(stream, words, strict=True)]
        query, key, value = stream
        out = self.attend_joint(AttentionInputs(attn, query, key, value, attention_mask, "after", mask_is_length=True))
        hidden, text = out[:, :video], out[:, video:]
        if getattr(attn, "to_out", None) is not None:
            hidden = attn.to_out[1](attn.to_out[0](hidden))
        if getattr(attn, "to_add_out", None) is not None:
            text = attn.to_add_out(text)
        return hidden, text

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention, all `[B, N, H, D]`: as stock under method "dense"; else over the valid keys alone.

        The stock mask keeps PyTorch from its fastest kernel; the dense calls of a sparse run need not pay for it.
        """
        return super().dense(query, key, value, mask) if self.engine.is_dense else self.dense_valid(query, key, value)

    def dense_valid(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Dense attention without the padded keys; there is a mask `[B, 1, 1, N]` only where lengths differ."""
        state = self.engine.state
        if state is None or state.text_valid is None:
            return super().dense(query, key, value)
        lengths = [prod(state.grid) + words for words in state.text_valid]
        key, value = key[:, : max(lengths)], value[:, : max(lengths)]
        if min(lengths) == max(lengths):
            return super().dense(query, key, value)
        valid = torch.arange(max(lengths), device=key.device) < torch.tensor(lengths, device=key.device)[:, None]
        return super().dense(query, key, value, valid[:, None, None])


def _norm(norm: Any, x: Tensor) -> Tensor:
    normed: Tensor = x if norm is None else norm(x)
    return normed


@register_family
class HunyuanVideoFamily(Family):
    """`HunyuanVideoTransformer3DModel`: HunyuanVideo text and image to video."""

    name = "hunyuan-video"
    transformer_classes = ("HunyuanVideoTransformer3DModel",)
    stock_processors = ("HunyuanVideoAttnProcessor2_0",)

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Double blocks, then single blocks, as the published schedules number them."""
        return block_layers(model, "transformer_blocks", "attn") + block_layers(
            model, "single_transformer_blocks", "attn"
        )

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """One shared `HunyuanVideoJointAttention`."""
        return HunyuanVideoJointAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Latents `[B, C, F, H, W]` and patch sizes give the grid; the text mask, whose ones stand first, a length.

        Image to video by token replacement keeps the image as the first latent frame.
        """
        latents = arguments["hidden_states"]
        patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)
        words = tuple(int(n) for n in arguments["encoder_attention_mask"].sum(1).tolist())
        grid = patch_grid(latents, patch)
        prefix = int(model.config.image_condition_type == "token_replace")
        return ForwardGeometry(grid, latents.shape[0], arguments["timestep"], text_valid=words, prefix_frames=prefix)

    def token_ports(self, model: Any, arguments: dict[str, Any]) -> TokenPorts | None:
        """Patches and rotary tables enter, `proj_out` leaves; token replacement tells the first frame apart."""
        if model.config.image_condition_type == "token_replace":
            return None
        return TokenPorts({"x_embedder": 1, "rope": 0}, {"proj_out": 1})
