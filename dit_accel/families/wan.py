"""Wan 2.1 and 2.2 (text, image, first-last-frame to video, VACE, two experts, TI2V): self-attention over video tokens.

Cross-attention to text and image tokens keeps Diffusers' own processor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
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
from dit_accel.families.processor import AccelProcessor, AttentionInputs, project
from dit_accel.families.registry import register_family


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding on interleaved pairs, in the order of operations of Diffusers' Wan.

    Args:
        x: `[B, N, H, D]`.
        cos, sin: `[1, N, 1, D]`, every angle repeated twice.
    """
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = torch.empty_like(x)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out.type_as(x)


class WanSelfAttention(AccelProcessor):
    """Self-attention of a Wan block: the stock projections, norms and rotary embedding around `engine.attend`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend `hidden_states` `[B, N, C]` to themselves; the other arguments are those of the stock processor."""
        query, key, value = project(attn, hidden_states)
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key, value = (x.unflatten(2, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = rotate_pairs(query, *rotary_emb), rotate_pairs(key, *rotary_emb)
        out: Tensor = attn.to_out[0](self.attend_joint(AttentionInputs(attn, query, key, value, attention_mask)))
        out = attn.to_out[1](out)
        return out


@register_family
class WanFamily(Family):
    """`WanTransformer3DModel` (Wan 2.1 T2V, I2V, FLF2V, Wan 2.2 A14B and TI2V-5B) and `WanVACETransformer3DModel`."""

    name = "wan"
    transformer_classes = ("WanTransformer3DModel", "WanVACETransformer3DModel")
    stock_processors = ("WanAttnProcessor",)

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Self-attention `attn1` of every block; VACE's control blocks come last, so that layer i is block i."""
        control = block_layers(model, "vace_blocks", "attn1") if hasattr(model, "vace_blocks") else []
        return block_layers(model, "blocks", "attn1") + control

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """One shared `WanSelfAttention`."""
        return WanSelfAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Latents `[B, C, F, H, W]` and the model's patch size give the grid.

        A timestep per token (TI2V) that begins lower than it ends says that the first frame is the image.
        """
        latents, timestep = arguments["hidden_states"], arguments["timestep"]
        grid = patch_grid(latents, tuple(model.config.patch_size))
        prefix = int(timestep.ndim == 2 and bool((timestep[:, 0] < timestep[:, -1]).all()))
        return ForwardGeometry(grid, latents.shape[0], timestep, prefix_frames=prefix)

    def token_ports(self, model: Any, arguments: dict[str, Any]) -> TokenPorts | None:
        """Patches and rotary tables enter, `proj_out` leaves; so do VACE's control patches and a timestep per token."""
        enters = {"patch_embedding": 2, "rope": 1}
        if hasattr(model, "vace_patch_embedding"):
            control = arguments.get("control_hidden_states")
            if control is None or control.shape[2:] != arguments["hidden_states"].shape[2:]:
                return None
            enters["vace_patch_embedding"] = 2
        return TokenPorts(enters, {"proj_out": 1}, {"timestep": 1} if arguments["timestep"].ndim == 2 else {})
