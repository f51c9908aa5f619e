"""FLUX.1: text before the image; double blocks with projections of their own for text, single blocks without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.families.base import (
    AttentionLayer,
    Family,
    ForwardGeometry,
    TokenPorts,
    block_layers,
    image_grid,
)
from dit_accel.families.processor import AccelProcessor, AttentionInputs, project
from dit_accel.families.registry import register_family


def _project(attn: Any, hidden: Tensor, text: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v `[B, N, H, D]` of the image (or joint) stream, and of the text stream where it has its own."""
    has_text = text is not None and attn.added_kv_proj_dim is not None
    image, words = list(project(attn, hidden)), []
    if has_text and attn.fused_projections:
        words = list(attn.to_added_qkv(text).chunk(3, dim=-1))
    elif has_text:
        words = [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text)]
    image, words = ([x.unflatten(-1, (-1, attn.head_dim)) for x in stream] for stream in (image, words))
    image[:2] = attn.norm_q(image[0]), attn.norm_k(image[1])
    if words:
        words[:2] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
    return image, words


class _FluxAttention(AccelProcessor):
    """What FLUX's processors share: projections, norms and rotary embedding around `engine.attend`."""

    def _attend(
        self, attn: Any, hidden: Tensor, text: Tensor | None, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Output of attention `[B, M + N, C]` and the image's query before rotation `[B, N, H, D]`."""
        image, words = _project(attn, hidden, text)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(words, image, strict=True)) if words else image
        if rotary is not None:
            query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        return self.attend_joint(AttentionInputs(attn, query, key, value, mask, "before")), image[0]

    @staticmethod
    def _project_out(attn: Any, out: Tensor, words: int) -> tuple[Tensor, Tensor]:
        text, hidden = out.split_with_sizes([words, out.shape[1] - words], dim=1)
        return attn.to_out[1](attn.to_out[0](hidden.contiguous())), attn.to_add_out(text.contiguous())


class FluxJointAttention(_FluxAttention):
    """Joint attention of FLUX blocks: double blocks with the text apart, single blocks with text and image in one."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend `hidden_states` `[B, N, C]` with the text `[B, M, C]`; single blocks pass both in `hidden_states`."""
        out, _ = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return out if encoder_hidden_states is None else self._project_out(attn, out, encoder_hidden_states.shape[1])


class FluxIPAdapterAttention(_FluxAttention, FluxIPAdapterAttnProcessor):
    """`FluxJointAttention` that adds what an IP-adapter's image tokens say, with the stock processor's own weights.

    It is an instance of Diffusers' class, so that `set_ip_adapter_scale` finds it.

    Args:
        engine: the engine to call.
        stock: the processor it stands for; weights and scales remain that one's.
    """

    def __init__(self, engine: Engine, stock: Any) -> None:
        nn.Module.__init__(self)
        _FluxAttention.__init__(self, engine)
        # Not a child module: the names of the weights stay those of the stock processor.
        object.__setattr__(self, "_stock", stock)
        self.to_k_ip, self.to_v_ip = stock.to_k_ip, stock.to_v_ip

    @property
    def scale(self) -> Any:
        """Strength of every adapter, shared with the stock processor."""
        return self._stock.scale

    @scale.setter
    def scale(self, value: Any) -> None:
        self._stock.scale = value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: list[Tensor] | None = None,
        ip_adapter_masks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """As `FluxJointAttention`, with a third output `[B, N, C]`.

        It comes from `ip_hidden_states`, one `[B, M, C]` or `[B, images, M, C]` per adapter.
        """
        out, query = self._attend(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        if encoder_hidden_states is None:
            return out
        hidden, text = self._project_out(attn, out, encoder_hidden_states.shape[1])
        added = torch.zeros_like(hidden)
        for i, tokens in enumerate(ip_hidden_states or []):
            kv = (to[i](tokens).flatten(1, -2) for to in (self.to_k_ip, self.to_v_ip))
            key, value = (x.unflatten(-1, (attn.heads, -1)) for x in kv)
            added += self.scale[i] * self.dense(query, key, value).flatten(2, 3).type_as(query)
        return hidden, text, added


@register_family
class FluxFamily(Family):
    """`FluxTransformer2DModel`: FLUX.1 dev, schnell, Fill and Kontext, with or without IP-adapters."""

    name = "flux"
    transformer_classes = ("FluxTransformer2DModel",)
    stock_processors = ("FluxAttnProcessor", "FluxIPAdapterAttnProcessor")

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Double blocks, then single blocks; a layer with an IP-adapter has weights of its own in its processor."""
        layers = block_layers(model, "transformer_blocks", "attn", "joint") + block_layers(
            model, "single_transformer_blocks", "attn", "joint"
        )
        return [replace(x, role=x.name) if _has_adapter(x) else x for x in layers]

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """One shared `FluxJointAttention`; a `FluxIPAdapterAttention` for every layer with an IP-adapter."""
        if _has_adapter(layer):
            return FluxIPAdapterAttention(engine, layer.module.processor)
        return FluxJointAttention(engine)

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """The position ids of image and reference tokens give the grid; timesteps lie in [0, 1]."""
        batch, tokens, _ = arguments["hidden_states"].shape
        grid = image_grid(arguments["img_ids"], tokens)
        return ForwardGeometry(grid, batch, arguments["timestep"], timestep_scale=1.0)

    def token_ports(self, model: Any, arguments: dict[str, Any]) -> TokenPorts | None:
        """Image tokens enter, and their position ids; ControlNet adds to the blocks what stands in the raster."""
        controls = ("controlnet_block_samples", "controlnet_single_block_samples")
        if any(arguments.get(name) is not None for name in controls) or arguments["img_ids"].ndim != 2:
            return None
        return TokenPorts({"x_embedder": 1}, {"proj_out": 1}, {"img_ids": 0})


def _has_adapter(layer: AttentionLayer) -> bool:
    return type(layer.module.processor).__name__ == "FluxIPAdapterAttnProcessor"
