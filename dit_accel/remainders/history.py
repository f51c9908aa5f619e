"""The remainder from earlier steps: what the unselected keys contributed when all of them were last computed.

Source: Re-ttention (arXiv 2505.22918). Its cache holds one tensor like the output per layer and guidance branch.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dit_accel.kernels import block_attention
from dit_accel.methods.base import Method
from dit_accel.plan import BlockPlan
from dit_accel.remainders.partial import PartialAttention
from dit_accel.state import CallContext

_KEY = "history"


@dataclass(frozen=True)
class History:
    """What is kept from a refresh, in the chosen order.

    Args:
        step: of the refresh.
        method: that made the plan; at another density it would be another.
        plan: what the rest is left by, and goes on with until the next refresh.
        share: of the full softmax that the selected keys held, `[B, H, N, 1]`.
        rest: what the other keys added to the output, `[B, H, N, D]`.
    """

    step: int
    method: Method
    plan: BlockPlan
    share: Tensor
    rest: Tensor


def history_of(call: CallContext, period: int, method: Method) -> History | None:
    """What this step goes on with; None at a refresh: every `period` steps, and where nothing fitting is kept."""
    kept: History | None = call.memory.get(_KEY)
    fits = kept is not None and kept.method == method and kept.step < call.step < kept.step + period
    return kept if fits and call.step % period else None


def with_history(part: PartialAttention, period: int, ramp: float, method: Method) -> Tensor:
    """Dense output at a refresh; between refreshes the selected part at its kept share, plus the kept rest.

    Args:
        part: the selected keys, between refreshes by the plan of `history_of`; a refresh adds 1 to its density.
        period: steps from one refresh to the next.
        ramp: by how much the share grows with every step after the first; it never exceeds 1.
        method: that made the plan. What another one left, or this one at another density, is not used.
    """
    call, out = part.call, part.out
    kept = history_of(call, period, method)
    if kept is None:
        whole = BlockPlan.full(part.plan.q_blocks, part.plan.k_blocks, out.device)
        kv_len = call.layout.valid_lengths(out.device)
        dense, full = block_attention(part.q, part.k, part.v, whole, scale=part.scale, kv_len=kv_len, return_lse=True)
        share = (part.lse - full).exp().nan_to_num(0.0).unsqueeze(-1).to(out.dtype)
        call.memory[_KEY] = History(call.step, method, part.plan, share, dense - share * out)
        call.extra_density += 1.0
        return dense
    share = (kept.share + (call.step - kept.step - 1) * ramp).clamp(max=1)
    return share * out + kept.rest
