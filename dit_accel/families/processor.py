"""Our attention processors: the stock projections around one call of the engine.

Axis legend: B batch, N tokens, H heads, D head size, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.layout import TextPosition

if TYPE_CHECKING:
    from dit_accel.engine import Engine

UNKNOWN_MASK = "the call has an attention mask that is no valid length"


@dataclass(frozen=True, eq=False)
class AttentionInputs:
    """What an attention layer attends with, after its projections, norms and rotary embedding.

    Args:
        attn: the attention module, which says the layer.
        query, key, value: `[B, N, H, D]`, video and text together.
        mask: attention mask of the stock processor. Default None: there is none.
        text: where text stands. Default: there is none.
        mask_is_length: the mask says no more than the valid lengths that the family has read. A call with any other
            mask runs dense.
    """

    attn: Any
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    text: TextPosition = "none"
    mask_is_length: bool = False

    @property
    def reason(self) -> str | None:
        """Why no method can run the call, for the report; None: one can."""
        return None if self.mask is None or self.mask_is_length else UNKNOWN_MASK


def project(attn: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v `[B, N, C]` of `hidden` `[B, N, C]`, by projections that Diffusers may have fused into one."""
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden).chunk(3, dim=-1)
        return query, key, value
    return attn.to_q(hidden), attn.to_k(hidden), attn.to_v(hidden)


class AccelProcessor:
    """Base of our attention processors. One instance serves all layers of a role; the layer is the module it is given.

    The two class attributes are those by which Diffusers finds processors in `set_attention_backend` and
    `enable_parallelism`; without them both would skip our layers silently.
    """

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __init__(self, engine: Engine | None = None) -> None:
        """`engine`: the engine to call.

        Raises:
            UnsupportedError: there is none. Diffusers makes a processor anew from its class, without arguments, when
                adapters with processors of their own are loaded or unloaded.
        """
        if engine is None:
            raise UnsupportedError(
                "the attention processors of an accelerated model cannot be made anew: call remove() before "
                "load_ip_adapter() or unload_ip_adapter(), and accelerate() after it"
            )
        self.engine = engine

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention as the stock processor runs it. All `[B, N, H, D]`; obeys `set_attention_backend`."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out

    def attend_joint(self, inputs: AttentionInputs) -> Tensor:
        """Attention over video and text together, `[B, N, H * D]`."""
        query, key, value = inputs.query, inputs.key, inputs.value

        def dense() -> Tensor:
            return self.dense(query, key, value, inputs.mask)

        if self._parallel_config is None or self.engine.is_dense:
            out = self.engine.attend(
                inputs.attn, query, key, value, dense=dense, text=inputs.text, reason=inputs.reason
            )
        else:
            out = self._attend_parallel(inputs)
        return out.flatten(2, 3).type_as(query)

    def _attend_parallel(self, inputs: AttentionInputs) -> Tensor:
        """Attention of one process under Diffusers' context parallelism, `[B, N local, H, D]` in and out."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        from dit_accel.families.parallel import attend_ring, attend_ulysses

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            out: Tensor = dispatch_attention_fn(q, k, v, attn_mask=mask, backend=self._attention_backend)
            return out

        attend = attend_ring if self._parallel_config.context_parallel_config.ring_degree > 1 else attend_ulysses
        return attend(self.engine, inputs, self._parallel_config, dense)
