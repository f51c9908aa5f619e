"""Products of many rows with the rows of one matrix, in fp32 by the library that is faster on the CPU."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

# Multiplications per matrix from which oneDNN pays for the way into its own layout and back.
_LARGE = 2**24


class KeyMatrix:
    """Keys that several groups of rows are multiplied with. No gradient passes.

    On a CPU large fp32 products go through oneDNN: it uses the widest vector units of processors of every maker, where
    the library behind `torch.matmul` may use half of their width. Nothing is rounded to less than fp32.

    Args:
        keys: `[..., N, K]`.
        bias: what is added to every row of the products, `[..., 1, N]`; axes of size 1 are shared. Default: nothing.
    """

    def __init__(self, keys: Tensor, bias: Tensor | None = None) -> None:
        self._keys = keys.detach()
        self._bias = None if bias is None else bias.detach().expand(*keys.shape[:-2], 1, -1)

    def times(self, rows: Tensor) -> Tensor:
        """`rows @ keysᵀ + bias`, `[..., M, N]`, for rows `[..., M, K]` with the leading axes of the keys."""
        rows = rows.detach()
        if not has_onednn(rows) or rows.shape[-2] * self._keys.shape[-2] * rows.shape[-1] < _LARGE:
            out = rows @ self._keys.transpose(-1, -2)
            return out if self._bias is None else out.add_(self._bias)
        out = rows.new_empty(*rows.shape[:-1], self._keys.shape[-2])
        into = out.view(-1, *out.shape[-2:])
        for number, (part, (matrix, bias)) in enumerate(zip(_matrices(rows), self._in_onednn, strict=True)):
            into[number] = F.linear(part.to_mkldnn(), matrix, bias).to_dense()
        return out

    @cached_property
    def _in_onednn(self) -> list[tuple[Tensor, Tensor | None]]:
        matrices = [matrix.to_mkldnn() for matrix in _matrices(self._keys)]
        if self._bias is None:
            return [(matrix, None) for matrix in matrices]
        return list(zip(matrices, _matrices(self._bias)[:, 0].contiguous(), strict=True))


def _matrices(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[-2:])


def has_onednn(x: Tensor) -> bool:
    """Whether oneDNN can multiply matrices like `x`: fp32 on a CPU, in a build of PyTorch that has it switched on."""
    backend = torch.backends.mkldnn
    return x.device.type == "cpu" and x.dtype == torch.float32 and backend.is_available() and bool(backend.enabled)
