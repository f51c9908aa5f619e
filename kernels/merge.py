"""Exact merge of attention parts that were computed apart over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dit_accel.errors import PlanError


def merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge parts by their log-sum-exp.

    Args:
        outs: outputs `[..., N, D]` of the parts.
        lses: their natural-log sums of exponentials `[..., N]`; -inf where a part had no key.

    Returns:
        Output (in the dtype of the first part) and log-sum-exp of attention over the union of the keys; 0 and -inf
        where no part had a key.

    Raises:
        PlanError: no parts, or not one log-sum-exp of the right shape for each output.
    """
    if not outs or [tuple(o.shape[:-1]) for o in outs] != [tuple(x.shape) for x in lses]:
        raise PlanError(
            f"merge: expected a log-sum-exp [..., N] for each output [..., N, D], got outputs "
            f"{[tuple(o.shape) for o in outs]} and log-sum-exps {[tuple(x.shape) for x in lses]}"
        )
    stacked = torch.stack(list(lses))
    lse = stacked.logsumexp(0)
    # Without any key the weights would be exp(-inf + inf).
    weights = (stacked - lse.masked_fill(lse.isneginf(), 0)).exp().unsqueeze(-1)
    out = weights[0] * outs[0]
    for weight, part in zip(weights[1:], outs[1:], strict=True):
        out = out + weight * part
    return out.to(outs[0].dtype), lse
