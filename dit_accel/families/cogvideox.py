"""CogVideoX 2B, 5B and 1.5 (text and image to video): text before the video in every block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.families.base import AttentionLayer, Family, ForwardGeometry, TokenPorts, block_layers
from dit_accel.families.processor import AccelProcessor, AttentionInputs, project
from dit_accel.families.registry import register_family


class CogVideoXJointAttention(AccelProcessor):
    """Joint attention of CogVideoX blocks: the stock projections, norms and rotary embedding around `engine.attend`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend the text `[B, M, C]` and the video `[B, N, C]` to each other."""
        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in project(attn, joint))
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (
                torch.cat([x[:, :text], apply_rotary_emb(x[:, text:], image_rotary_emb, sequence_dim=1)], dim=1)
                for x in (query, key)
            )
        out = self.attend_joint(AttentionInputs(attn, query, key, value, attention_mask, "before"))
        out = attn.to_out[1](attn.to_out[0](out))
        return out[:, text:], out[:, :text]


@register_family
class CogVideoXFamily(Family):
    """`CogVideoXTransformer3DModel`: 2B and 5B, 1.0 and 1.5."""

    name = "cogvideox"
    transformer_classes = ("CogVideoXTransformer3DModel",)
    stock_processors = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")

    def layers(self, model: Any) -> list[AttentionLayer]:
        """`attn1` of every block."""
        return block_layers(model, "transformer_blocks", "attn1")

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """One shared `CogVideoXJointAttention`."""
        return CogVideoXJointAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Latents `[B, F, C, H, W]` and the model's patch size (1.5 patches frames too) give the grid."""
        batch, frames, _, height, width = arguments["hidden_states"].shape
        patch, patch_frames = model.config.patch_size, model.config.patch_size_t or 1
        grid = (frames // patch_frames, height // patch, width // patch)
        return ForwardGeometry(grid, batch, arguments["timestep"])

    def token_ports(self, model: Any, arguments: dict[str, Any]) -> TokenPorts | None:
        """Patches, behind the text, and rotary tables enter, `proj_out` leaves."""
        rotary = {} if arguments.get("image_rotary_emb") is None else {"image_rotary_emb": 0}
        return TokenPorts({"patch_embed": 1}, {"proj_out": 1}, rotary)
