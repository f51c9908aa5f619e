"""The `flex` backend: PyTorch's FlexAttention over the block lists of a plan, compiled.

Every call carries a `mask_mod` that says the same as the lists: without one, FlexAttention's eager form ignores the
lists and computes dense attention, and torch falls back to that form after a few recompilations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import AttentionCall, Precision
from dit_accel.plan import BlockPlan


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`."""
    return attend(q, k, v, call.plan, call.scale, call.kv_len, _compiled())


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def attend(
    q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, kv_len: Tensor | None, flex: Callable[..., Any]
) -> tuple[Tensor, Tensor]:
    """Output like q and log-sum-exp fp32 `[B, H, Nq]` of `flex`, which is `flex_attention` or its compiled form."""
    mask = block_mask(plan, q.shape[0], q.shape[1], kv_len)
    out, lse = flex(q, k, v, block_mask=mask, scale=scale, return_lse=True)
    # Where a query has no key, its two forms disagree about what they return.
    empty = _empty_rows(plan, q, kv_len)
    return out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)


def block_mask(plan: BlockPlan, batch: int, heads: int, kv_len: Tensor | None) -> BlockMask:
    """The lists of a plan of uniform blocks, and a `mask_mod` that says the same token by token."""
    nq, nk, device = plan.q_blocks.count, plan.k_blocks.count, plan.indices.device
    q_size, k_size = plan.q_blocks.size, plan.k_blocks.size
    selected = plan.to_mask().expand(batch, heads, nq, nk)
    length = torch.full((batch,), plan.k_blocks.tokens, device=device) if kv_len is None else kv_len.to(device)

    def mask_mod(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return selected[b, h, i // q_size, j // k_size] & (j < length[b])

    # Its lists are as long as there are key blocks.
    lists = torch.nn.functional.pad(plan.indices, (0, nk - plan.indices.shape[-1]))
    lists = torch.where(torch.arange(nk, device=device) < plan.counts.unsqueeze(-1), lists, 0)
    counts = plan.counts.expand(batch, heads, nq).contiguous()
    return BlockMask.from_kv_blocks(
        counts,
        lists.expand(batch, heads, nq, nk).contiguous(),
        BLOCK_SIZE=(q_size, k_size),
        mask_mod=mask_mod,
        seq_lengths=(plan.q_blocks.tokens, plan.k_blocks.tokens),
    )


def _empty_rows(plan: BlockPlan, q: Tensor, kv_len: Tensor | None) -> Tensor:
    """Bool `[B, H, Nq]`: queries whose selected blocks hold no real key."""
    starts = plan.k_blocks.on(q.device)[0]
    real = torch.ones(1, 1, 1, plan.k_blocks.count, dtype=torch.bool, device=q.device)
    if kv_len is not None:
        real = (starts < kv_len.to(q.device).unsqueeze(-1)).view(-1, 1, 1, plan.k_blocks.count)
    rows = ~(plan.to_mask() & real).any(-1)
    return rows.repeat_interleave(plan.q_blocks.size, -1)[..., : q.shape[2]].expand(q.shape[:3])


def _why_not(request: Request) -> str | None:
    if request.device.type != "cuda":
        return "only its compiled form skips blocks, and compiled for the CPU it is slower than the torch backend"
    if request.remainder is not None:
        return "FlexAttention has no remainder"
    if request.precision is not None and request.precision != Precision():
        return "FlexAttention neither quantises nor skips tiles"
    if request.has_predicate or not request.is_uniform:
        return "only whole blocks of one length map to its lists"
    if request.q_size % 128 or request.k_size % 64:
        return f"it needs blocks of a multiple of 128 x 64 tokens, the plan has {request.q_size} x {request.k_size}"
    return None


# Never chosen by "auto": nobody has measured it faster than the Triton backend at these shapes.
BACKEND = Backend("flex", run, _why_not, priority=-1, break_even=0.5)
