"""Processors that put a stream's attention into Diffusers' own Wan attention modules.

Axis legend: B batch, N tokens of the pass, L text tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.families.processor import project
from dit_accel.pipelines.streaming.attention import attend_pass

if TYPE_CHECKING:
    from dit_accel.pipelines.streaming.runtime import CausalWan


class _Processor:
    """Base of both processors: outside a stream's pass the replaced processor runs, so the model stays what it was."""

    # Diffusers finds processors by these attributes in `set_attention_backend` and `enable_parallelism`.
    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __init__(self, runtime: CausalWan, layer: int, stock: Any) -> None:
        self.runtime, self.layer, self.stock = runtime, layer, stock

    def _refuse_parallel(self) -> None:
        if self._parallel_config is not None:
            raise UnsupportedError(
                "streaming under Diffusers' context parallelism: every rank holds only a part of a chunk; run one "
                "stream per device instead"
            )


class CausalSelfAttention(_Processor):
    """Self-attention of a Wan block over the cache of the stream whose pass is running."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend `hidden_states` `[B, N, C]`; the other arguments are those of the stock processor."""
        now = self.runtime.now
        if now is None:
            return self.stock(attn, hidden_states, *args, **kwargs)
        self._refuse_parallel()
        q, k, v = project(attn, hidden_states)
        q, k = attn.norm_q(q), attn.norm_k(k)
        q, k, v = (x.unflatten(2, (attn.heads, -1)) for x in (q, k, v))
        out = attend_pass(now, self.layer, q, k, v, self._attention_backend)
        out = attn.to_out[0](out.flatten(2, 3).type_as(q))
        return attn.to_out[1](out)


class CachedCrossAttention(_Processor):
    """Cross-attention of a Wan block whose text keys and values are made once per prompt."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend `hidden_states` `[B, N, C]` to the text `[B, L, C]`; the others are those of the stock processor."""
        now = self.runtime.now
        if now is None:
            return self.stock(attn, hidden_states, encoder_hidden_states, *args, **kwargs)
        kept = now.branch.text_kv
        if self.layer not in kept:
            kept[self.layer] = self._text(attn, encoder_hidden_states)
        q = attn.norm_q(attn.to_q(hidden_states)).unflatten(2, (attn.heads, -1))
        out = dispatch_attention_fn(q, *kept[self.layer], backend=self._attention_backend)
        out = attn.to_out[0](out.flatten(2, 3).type_as(q))
        return attn.to_out[1](out)

    @staticmethod
    def _text(attn: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        if getattr(attn, "fused_projections", False):
            k, v = attn.to_kv(text).chunk(2, dim=-1)
        else:
            k, v = attn.to_k(text), attn.to_v(text)
        return attn.norm_k(k).unflatten(2, (attn.heads, -1)), v.unflatten(2, (attn.heads, -1))
