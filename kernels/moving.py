"""Tokens into an order and back: whole rows are copied, by a Triton kernel where it runs.

Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.kernels.operations import register_operation, uses_triton
from dit_accel.kernels.triton_configs import pad_head_dim

_ROWS_PER_PROGRAM = 64


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`out[..., p, :] = x[..., index[p], :]`.

    Args:
        x: `[B, H, N, D]`.
        index: int64 `[N]` or `[B or 1, H or 1, N]`, a permutation.

    Raises:
        PlanError: the index is not for N tokens.
    """
    _check_length(x, index)
    if uses_triton("move", x):
        return move(x, index, scatter=False)
    if index.ndim == 1:
        return x.index_select(2, index)
    batch, heads, tokens, dim = x.shape
    # Whole rows are copied; `gather` would read an index for every element.
    first = torch.arange(batch * heads, device=index.device).view(batch, heads, 1) * tokens
    return x.reshape(-1, dim).index_select(0, (index + first).flatten()).view(batch, heads, -1, dim)


def scatter_in_triton(x: Tensor, index: Tensor) -> Tensor:
    """Undo `gather_tokens` with the same permutation: `out[..., index[p], :] = x[..., p, :]`; same arguments."""
    _check_length(x, index)
    return move(x, index, scatter=True)


def _check_length(x: Tensor, index: Tensor) -> None:
    if index.shape[-1] != x.shape[2]:
        raise PlanError(f"order: expected a permutation of {x.shape[2]} tokens, got one of {index.shape[-1]}")


def move(x: Tensor, index: Tensor, scatter: bool) -> Tensor:
    """The Triton form of gathering, or with `scatter` of undoing it."""
    from dit_accel.kernels.triton_selection import move_rows

    index = (index if index.ndim == 3 else index.view(1, 1, -1)).contiguous()
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty_like(x)
    index_b, index_h = (0 if n == 1 else s for n, s in zip(index.shape[:2], index.stride()[:2], strict=True))
    grid = (-(-x.shape[2] // _ROWS_PER_PROGRAM), x.shape[1], x.shape[0])
    with torch.cuda.device_of(x):
        move_rows[grid](
            x, out, index, *x.stride()[:3], *out.stride()[:3], index_b, index_h, x.shape[2],
            DIM=x.shape[-1], PADDED_DIM=pad_head_dim(x.shape[-1]), ROWS=_ROWS_PER_PROGRAM, SCATTER=scatter,
        )  # fmt: skip
    return out


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 70, 24, generator=generator).to(device, dtype)
    index = torch.rand(2, 3, 70, generator=generator).argsort(-1).to(device)
    moved = move(x, index, scatter=False)
    if not torch.equal(moved, x.gather(2, index.unsqueeze(-1).expand_as(x))):
        return "it puts tokens in the wrong place"
    return None if torch.equal(move(moved, index, scatter=True), x) else "it does not undo itself"


register_operation("move", _check)
