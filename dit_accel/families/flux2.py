"""FLUX.2 (dev, klein): text before the image; single blocks whose projections hold the feed-forward part too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor

from dit_accel.engine import Engine
from dit_accel.errors import UnsupportedError
from dit_accel.families.base import (
    AttentionLayer,
    Family,
    ForwardGeometry,
    block_layers,
    image_grid,
)
from dit_accel.families.flux import FluxJointAttention
from dit_accel.families.processor import AccelProcessor, AttentionInputs
from dit_accel.families.registry import register_family


class Flux2ParallelAttention(AccelProcessor):
    """Attention of a FLUX.2 single block, whose projections serve its feed-forward part too."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend text and image `[B, N, C]`, text first, to themselves."""
        sizes = [3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor]
        qkv, feed = attn.to_qkv_mlp_proj(hidden_states).split(sizes, dim=-1)
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv.chunk(3, dim=-1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        out = self.attend_joint(AttentionInputs(attn, query, key, value, attention_mask, "before"))
        joined: Tensor = attn.to_out(torch.cat([out, attn.mlp_act_fn(feed)], dim=-1))
        return joined


@register_family
class Flux2Family(Family):
    """`Flux2Transformer2DModel`: FLUX.2 dev and klein; reference images follow the image."""

    name = "flux2"
    transformer_classes = ("Flux2Transformer2DModel",)
    stock_processors = ("Flux2AttnProcessor", "Flux2ParallelSelfAttnProcessor")

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Double blocks, then single blocks."""
        return block_layers(model, "transformer_blocks", "attn", "joint") + block_layers(
            model, "single_transformer_blocks", "attn", "parallel"
        )

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """`FluxJointAttention`, which is FLUX.1's, or `Flux2ParallelAttention`."""
        return FluxJointAttention(engine) if layer.role == "joint" else Flux2ParallelAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """The position ids (image, row, column, word) of image and reference tokens give the grid.

        Raises:
            UnsupportedError: the pipeline caches the keys of its reference images, which changes the sequence.
        """
        if arguments.get("kv_cache_mode") is not None:
            raise UnsupportedError(
                "FLUX.2 with kv_cache_mode: reference tokens leave the sequence between steps; "
                "use Flux2KleinPipeline or Flux2Pipeline, which keep them"
            )
        batch, tokens, _ = arguments["hidden_states"].shape
        grid = image_grid(arguments["img_ids"], tokens)
        return ForwardGeometry(grid, batch, arguments["timestep"], timestep_scale=1.0)
