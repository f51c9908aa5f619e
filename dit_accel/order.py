"""Token orders: a permutation and its inverse, shared by all heads or one per head.

Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.kernels.moving import gather_tokens, scatter_in_triton
from dit_accel.kernels.operations import uses_triton
from dit_accel.layout import TokenLayout
from dit_accel.transfer import to_device


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """How tokens stand while attention is computed: position `p` holds the token `query[..., p]`.

    Args:
        query: int64 `[N]` (shared) or `[B or 1, H or 1, N]` (per head), a permutation of the query tokens.
        key: the same for keys and values. Default: the order of the queries.

    Raises:
        PlanError: not int64 or of another rank. `validate()` checks that it is a permutation.
    """

    query: Tensor
    key: Tensor | None = None

    def __post_init__(self) -> None:
        for name, index in (("query", self.query), ("key", self.key_index)):
            if index.dtype != torch.int64 or index.ndim not in (1, 3):
                raise PlanError(f"TokenOrder.{name}: expected int64 [N] or [B, H, N], got {index.dtype} {index.shape}")

    @property
    def key_index(self) -> Tensor:
        """The permutation of keys and values."""
        return self.query if self.key is None else self.key

    @property
    def is_shared(self) -> bool:
        """Whether all heads, and queries and keys, stand in the same order (such an order can be hoisted)."""
        return self.query.ndim == 1 and self.key is None

    @cached_property
    def inverse(self) -> Tensor:
        """The permutation that undoes `query`; same shape."""
        return torch.empty_like(self.query).scatter_(
            -1, self.query, torch.arange(self.query.shape[-1], device=self.query.device).expand_as(self.query)
        )

    def apply(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Put q, k, v `[B, H, N, D]` into this order."""
        return permute(q, self.query), permute(k, self.key_index), permute(v, self.key_index)

    def restore(self, out: Tensor) -> Tensor:
        """Put an output `[B, H, N, D]` (or statistics `[B, H, N]`) back into the order of the queries."""
        if out.ndim == 4 and uses_triton("move", out):
            return scatter_in_triton(out, self.query)
        return permute(out, self.inverse)

    def validate(self) -> TokenOrder:
        """Check that both indices are permutations (synchronises) and return self."""
        for name, index in (("query", self.query), ("key", self.key_index)):
            expected = torch.arange(index.shape[-1], device=index.device)
            if not bool((index.sort(-1).values == expected).all()):
                raise PlanError(f"TokenOrder.{name}: not a permutation of {index.shape[-1]} tokens")
        return self

    def to(self, device: torch.device | str) -> TokenOrder:
        """The same order with its indices on `device`; itself when they are there."""
        if self.query.device == torch.device(device):
            return self
        return TokenOrder(to_device(self.query, device), None if self.key is None else to_device(self.key, device))


def permute(x: Tensor, index: Tensor) -> Tensor:
    """Gather the token axis of `x` `[B, H, N, D]` or `[B, H, N]` by `index` `[N]` or `[B or 1, H or 1, N]`."""
    if x.ndim == 4:
        return gather_tokens(x, index)
    return x.index_select(2, index) if index.ndim == 1 else x.gather(2, index.expand(*x.shape[:2], -1))


def video_order(layout: TokenLayout, video_index: Tensor) -> TokenOrder:
    """Lift a permutation of the video tokens, int64 `[video]` or `[B or 1, H or 1, video]`, to the whole sequence.

    Text tokens stay where they are.
    """
    index = torch.arange(layout.tokens, device=video_index.device).expand(*video_index.shape[:-1], -1).clone()
    index[..., layout.video_slice()] = video_index + layout.video_start
    return TokenOrder(index)


def relative(order: TokenOrder | None, standing: TokenOrder) -> TokenOrder | None:
    """What puts tokens that stand in the shared order `standing` into `order` (None: raster); None: they stand so."""
    raster = torch.arange(standing.query.shape[-1], device=standing.query.device)
    order = TokenOrder(raster) if order is None else order
    query = standing.inverse.to(order.query.device)[order.query]
    key = None if order.key is None else standing.inverse.to(order.key.device)[order.key]
    if key is None and query.ndim == 1 and torch.equal(query, raster.to(query.device)):
        return None
    return TokenOrder(query, key)
