"""Dense attention of a batch of small problems, with its log-sum-exp: what the PyTorch path is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.quantize import weights_in_fp8


def attend_chunk(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, fp8: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of each of r problems, q `[r, Tq, D]`, k and v `[r, S, D]`, and its log-sum-exp `[r, Tq]`.

    Args:
        q, k, v: may be views, also of one problem expanded to all r.
        bias: added to the logits, `[r, 1 or Tq, S]`, -inf where a key does not count; every query needs one that does,
            or what it gets is undefined. None: all count.
        scale: factor on the logits.
        fp8: round the weights to e4m3, as a kernel does that multiplies them with values in e4m3.
    """
    if q.device.type == "cpu" and not fp8:
        # The public function does not return the log-sum-exp.
        mask = None if bias is None else bias.expand(-1, q.shape[1], -1).unsqueeze(0)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0], lse[0].to(q.dtype)
    logits = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
    logits = logits if bias is None else logits.add_(bias)
    if fp8:
        weights, total, mass = weights_in_fp8(logits)
        return torch.bmm(weights, v).div_(total), mass.squeeze(-1)
    lse = logits.logsumexp(-1)
    return torch.bmm(logits.sub_(lse.unsqueeze(-1)).exp_(), v), lse
