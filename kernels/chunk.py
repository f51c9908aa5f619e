"""Dense attention of a batch of small problems, with its log-sum-exp: what the PyTorch path is made of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.kernels.products import are_wide
from dit_accel.kernels.quantize import weights_in_fp8

_LOGITS = 1 << 22  # the most logits per thread that are in memory at once


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of each of r problems, q `[r, Tq, D]`, k and v `[r, S, D]`, and its log-sum-exp `[r, Tq]`.

    Args:
        q, k: may be views.
        v: in the dtype of q, or where products are wide in bfloat16: the weights are then rounded to it.
        bias: added to the logits, `[r, 1 or Tq, S]`, 0 or, where a key does not count, -inf; every query needs one key
            that does, or what it gets is undefined. None: all count.
        scale: factor on the logits.
        fp8: round the weights to e4m3, as a kernel does that multiplies them with values in e4m3.
    """
    if q.device.type == "cpu" and not fp8 and not are_wide(q.device):
        # The public function does not return the log-sum-exp.
        mask = None if bias is None else bias.expand(-1, q.shape[1], -1).unsqueeze(0)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0], lse[0].to(q.dtype)
    rows = max(1, _LOGITS * torch.get_num_threads() // (len(q) * k.shape[1]))
    parts = []
    for first in range(0, q.shape[1], rows):
        of_rows = bias if bias is None or bias.shape[1] == 1 else bias[:, first : first + rows]
        parts.append(_attend(q[:, first : first + rows], k, v, of_rows, scale, fp8))
    if len(parts) == 1:
        return parts[0]
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, fp8: bool) -> tuple[Tensor, Tensor]:
    """The same with all logits `[r, Tq, S]` in memory."""
    # 2**x is faster than e**x.
    logits = torch.bmm(q * (scale / math.log(2)), k.mT)
    logits = logits if bias is None else logits.add_(bias)
    weights, total, lse = weights_in_fp8(logits) if fp8 else _weights(logits)
    return torch.bmm(weights.to(v.dtype), v).to(q.dtype).div_(total), lse


def _weights(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2**logits up to a factor per row `[..., L]`, in place, their sum `[..., 1]`, and the natural log-sum-exp `[...]`.

    Logits are in units of log 2.
    """
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp2_()
    total = weights.sum(-1, keepdim=True)
    return weights, total, (top + total.log2()).squeeze(-1).mul_(math.log(2))
