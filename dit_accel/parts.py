"""The heads of one attention call that run under one method, and how their outputs become one.

Axis legend: B batch, H heads (H' of a part), N tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.dense import dense_attention, preferred
from dit_accel.kernels.registry import Backend
from dit_accel.methods.base import Method
from dit_accel.planner import QKV, Planned
from dit_accel.state import CallContext


@dataclass(frozen=True)
class Part:
    """Heads that run under one method (`heads` None: all of them), with q, k, v `[B, H', N, D]` in its order.

    `is_dense`: their density is above the break-even, so that dense attention computes them faster.
    """

    heads: Tensor | None
    method: Method
    planned: Planned
    qkv: QKV
    call: CallContext
    backend: Backend
    is_dense: bool

    @property
    def computed_by(self) -> str:
        """The backend, for the report."""
        return f"dense {preferred(self.qkv[0])}" if self.is_dense else self.backend.name

    @property
    def density(self) -> float | Tensor:
        """Share of token pairs that are computed."""
        return 1.0 if self.is_dense else self.planned.density

    @property
    def is_whole(self) -> bool:
        """Once it is computed: whether all pairs were, be it only to renew what the method keeps of them."""
        return self.is_dense or self.call.extra_density >= 1

    def compute(self) -> Tensor:
        """Its output `[B, H', N, D]`, in the raster's order."""
        if self.is_dense:
            out = dense_attention(*self.qkv)
        else:
            out = self.method.compute(*self.qkv, self.planned.plan, self.call, backend=self.backend.name)
        return out if self.planned.order is None else self.planned.order.restore(out)


def known_density(planned: Planned, method: Method) -> float | None:
    """Density of a plan as far as the host knows it: on a GPU, where reading it would wait, the one asked for.

    None where it is chosen there by a rule, such as a share of the mass.
    """
    return planned.density if isinstance(planned.density, float) else method.requested_density


def of_heads(qkv: QKV, heads: Tensor | None) -> QKV:
    """q, k, v `[B, H, N, D]` of some heads, int64 `[H']`; None: of all."""
    q, k, v = qkv
    return qkv if heads is None else (q.index_select(1, heads), k.index_select(1, heads), v.index_select(1, heads))


def join(parts: list[Part], q: Tensor) -> Tensor:
    """The outputs of all parts as one, like q `[B, H, N, D]`; zero for skipped heads."""
    if parts and parts[0].heads is None:
        return parts[0].compute()
    out = torch.zeros_like(q)
    for part in parts:
        if part.heads is not None:
            out.index_copy_(1, part.heads, part.compute())
    return out
