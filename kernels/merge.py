"""Exact merge of attention parts that were computed apart over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts by their log-sum-exp.

    Args:
        outs: outputs `[B, H, N, D]` of the parts.
        lses: their log-sum-exps `[B, H, N]`; -inf where a part had no key.

    Returns:
        Output and log-sum-exp of attention over the union of the keys.
    """
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    weights = (stacked - lse).exp().nan_to_num(0.0).unsqueeze(-1)
    out = sum((w * o.to(w.dtype) for w, o in zip(weights, outs, strict=True)), torch.zeros((), dtype=weights.dtype))
    return out.to(outs[0].dtype), lse
