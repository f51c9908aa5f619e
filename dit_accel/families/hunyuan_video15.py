"""HunyuanVideo-1.5: double blocks only; image, glyph and prompt tokens after the video, their padding last."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.families.base import (
    AttentionLayer,
    Family,
    ForwardGeometry,
    block_layers,
    patch_grid,
)
from dit_accel.families.hunyuan_video import HunyuanVideoJointAttention
from dit_accel.families.registry import register_family


class HunyuanVideo15JointAttention(HunyuanVideoJointAttention):
    """Joint attention of HunyuanVideo-1.5 blocks, which are HunyuanVideo's double blocks with another mask.

    Diffusers expands the padding to a mask of all pairs of tokens. Here it is a valid length per batch item, and when
    the lengths agree the padded keys are cut off, so that dense attention needs no mask at all.
    """

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention over the valid keys, all `[B, N, H, D]`; the lengths say what `mask` says."""
        return self.dense_valid(query, key, value)


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
