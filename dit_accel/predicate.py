"""Which tokens of a partial block count: a box per query, or a ball inside it.

Axis legend: B batch, H heads, Nq / Nk query / key tokens, A axes of the coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.transfer import to_device


@dataclass(frozen=True, eq=False)
class BoxPredicate:
    """Which tokens of a partial block count: those whose coordinates lie in a box given per query token.

    Key `j` is kept for query `i` iff for every axis c ``lower[i, c] <= coordinates[j, c] < upper[i, c]`` and
    ``(coordinates[j, c] - lower[i, c]) % stride[c] == 0`` (stride > 1 is a dilated window) and, with a `ball`,
    ``sum_c ball[c] * (2 * coordinates[j, c] - lower[i, c] - upper[i, c] + 1)**2 < ball[A]``: the key is inside an
    ellipsoid about the middle of the box.

    Args:
        lower: int32 `[Nq, A]`, first kept coordinate; `[B or 1, H or 1, Nq, A]` where heads differ.
        upper: like `lower`, one past the last kept coordinate.
        coordinates: int32 `[Nk, A]`; with the leading axes of `lower` where heads differ.
        stride: one step per axis, default 1 everywhere.
        ball: fp32 `[A + 1]`, the weight of each axis and the limit. Default None: the whole box.

    Raises:
        PlanError: shapes disagree.
    """

    lower: Tensor
    upper: Tensor
    coordinates: Tensor
    stride: tuple[int, ...] = ()
    ball: Tensor | None = None

    def __post_init__(self) -> None:
        axes = self.coordinates.shape[-1]
        if not self.stride:
            object.__setattr__(self, "stride", (1,) * axes)
        shapes = {x.shape[:-2] + x.shape[-1:] for x in (self.lower, self.upper, self.coordinates)}
        fits = self.lower.shape == self.upper.shape and len(shapes) == 1 and self.lower.ndim in (2, 4)
        if not fits or len(self.stride) != axes or (self.ball is not None and self.ball.shape != (axes + 1,)):
            raise PlanError(
                f"BoxPredicate: lower {tuple(self.lower.shape)}, upper {tuple(self.upper.shape)}, coordinates "
                f"{tuple(self.coordinates.shape)}, stride {self.stride} and ball "
                f"{None if self.ball is None else tuple(self.ball.shape)} must agree in their axes"
            )

    @property
    def is_shared(self) -> bool:
        """Whether all heads and batch items have the same boxes."""
        return self.lower.ndim == 2

    def keeps(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Which keys count for which queries.

        Args:
            queries, keys: token indices `[Q]` and `[K]`; of a shared predicate also `[..., Q]` and `[..., K]`.

        Returns:
            Bool `[..., Q, K]`; `[B or 1, H or 1, Q, K]` where heads differ.
        """
        return self._inside(self.lower[..., queries, :], self.upper[..., queries, :], self.coordinates[..., keys, :])

    def keeps_of(self, item: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
        """As `keeps` where heads differ, row by row: bool `[r, Q, K]`.

        Args:
            item: int64 `[r]`, the place of each row in the batch and head axes, flattened (`items`).
            queries, keys: token indices `[r, Q]` and `[r, K]`.
        """
        item = item.unsqueeze(-1)
        lower, upper, at = (x.flatten(0, 1) for x in (self.lower, self.upper, self.coordinates))
        return self._inside(lower[item, queries], upper[item, queries], at[item, keys])

    def items(self, batch: int, heads: int) -> Tensor:
        """Where each of `batch` * `heads` heads finds its boxes, int64 `[B * H]`, for `keeps_of`."""
        own_batch, own_heads = self.lower.shape[:2]
        places = torch.arange(own_batch * own_heads, device=self.lower.device).view(own_batch, own_heads)
        return places.expand(batch, heads).flatten()

    def _inside(self, lower: Tensor, upper: Tensor, at: Tensor) -> Tensor:
        """Bool `[..., Q, K]` for bounds `[..., Q, A]` and coordinates `[..., K, A]`."""
        inside: Tensor | None = None
        squared: Tensor | float = 0.0
        # One axis at a time: tensors with a short last axis are slow.
        for axis, step in enumerate(self.stride):
            low, high, place = (
                lower[..., axis].unsqueeze(-1),
                upper[..., axis].unsqueeze(-1),
                at[..., axis].unsqueeze(-2),
            )
            # An axis that holds all is skipped. On a GPU asking would make the host wait.
            is_free = place.device.type == "cpu" and bool((low.amax() <= place.amin()) & (place.amax() < high.amin()))
            if not is_free:
                kept = (place >= low) & (place < high)
                inside = kept if inside is None else inside & kept
            if step != 1:
                kept = (place - low) % step == 0
                inside = kept if inside is None else inside & kept
            if self.ball is not None:
                offset = (2 * place).to(self.ball.dtype) - (low + high - 1).to(self.ball.dtype)
                squared = squared + offset.square_().mul_(self.ball[axis])
        if self.ball is not None:
            kept = squared < self.ball[-1]
            inside = kept if inside is None else inside & kept
        if inside is None:
            return (lower[..., 0].unsqueeze(-1) == at[..., 0].unsqueeze(-2)).fill_(True)
        return inside

    def of_head(self, item: int, head: int) -> BoxPredicate:
        """The boxes `[Nq, A]` of one head of one batch item; itself when they are shared."""
        if self.is_shared:
            return self
        at = (min(item, self.lower.shape[0] - 1), min(head, self.lower.shape[1] - 1))
        return replace(self, lower=self.lower[at], upper=self.upper[at], coordinates=self.coordinates[at])

    def of_queries(self, tokens: Tensor) -> BoxPredicate:
        """The same for some query tokens alone, int64 `[n]` on any device."""
        rows = tokens.to(self.lower.device)
        return replace(self, lower=self.lower[..., rows, :], upper=self.upper[..., rows, :])

    def to(self, device: torch.device | str) -> BoxPredicate:
        """The same predicate with its tensors on `device`."""
        ball = None if self.ball is None else to_device(self.ball, device)
        lower, upper, coordinates = (to_device(x, device) for x in (self.lower, self.upper, self.coordinates))
        return replace(self, lower=lower, upper=upper, coordinates=coordinates, ball=ball)
