"""`block_attention`: exact attention over selected key blocks, with an optional remainder for the rest."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.kernels import custom_op
from dit_accel.kernels.registry import Request, choose_backend
from dit_accel.kernels.spec import AttentionCall, Precision, Remainder
from dit_accel.plan import BlockPlan


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = ...,
    remainder: Remainder | None = ...,
    precision: Precision | None = ...,
    kv_len: Tensor | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> Tensor: ...


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = ...,
    remainder: Remainder | None = ...,
    precision: Precision | None = ...,
    kv_len: Tensor | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[Tensor, Tensor]: ...


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float | None = None,
    remainder: Remainder | None = None,
    precision: Precision | None = None,
    kv_len: Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of each query block over the key blocks that `plan` selects for it.

    Args:
        q: queries `[B, H, Nq, D]`.
        k, v: keys and values `[B, H, Nk, D]`; Nk may differ from Nq.
        plan: which key blocks each query block attends; axes of size 1 are shared.
        scale: factor on the logits. Default 1 / sqrt(D).
        remainder: what becomes of the key blocks that are not selected. Default None: dropped.
        precision: arithmetic of the exact part. Default None: that of the inputs, accumulated in fp32.
        kv_len: int `[B]`, how many leading keys are real; the others get exactly zero weight. Default: all.
        return_lse: also return the natural-log sum of exponentials of the scaled logits, for merging parts.
        backend: "auto", or a name from `backends()`; an explicit one never falls back silently.

    Returns:
        The output `[B, H, Nq, D]` in the dtype of q; with `return_lse` also the log-sum-exp, fp32 (fp64 for fp64
        inputs) `[B, H, Nq]`. A query with no key left gives 0 and -inf.

    Raises:
        PlanError: shapes of q, k, v, plan and kv_len disagree.
        ConfigError: no backend has the name that was asked for.
        UnsupportedError: no backend, or not the one asked for, can run the call; the message says why.
    """
    if torch.compiler.is_compiling():
        # The checks read the contents of tensors; they run inside the operator.
        factor = q.shape[-1] ** -0.5 if scale is None else scale
        out, lse = custom_op.enter(q, k, v, AttentionCall(plan, factor, remainder, precision, kv_len), backend)
        return (out, lse) if return_lse else out
    _check(q, k, v, plan, kv_len)
    chosen = choose_backend(backend, request_of(q, plan, remainder, return_lse, precision))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = chosen.run(q, k, v, AttentionCall(plan.to(q.device), scale, remainder, precision, kv_len))
    return (out, lse) if return_lse else out


def request_of(
    q: Tensor,
    plan: BlockPlan,
    remainder: Remainder | None,
    return_lse: bool = False,
    precision: Precision | None = None,
) -> Request:
    """Describe a call for `choose_backend`. q `[B, H, N, D]`."""
    return Request(
        device=q.device,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        has_predicate=plan.predicate is not None,
        has_ball=plan.predicate is not None and plan.predicate.ball is not None,
        remainder=remainder,
        return_lse=return_lse,
        precision=precision,
        is_uniform=plan.q_blocks.is_uniform and plan.k_blocks.is_uniform,
        q_size=plan.q_blocks.size,
        k_size=plan.k_blocks.size,
    )


def _check(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, kv_len: Tensor | None) -> None:
    batch, heads, tokens, dim = q.shape
    if k.shape != v.shape or k.shape[:2] != q.shape[:2] or k.shape[3] != dim:
        raise PlanError(
            f"block_attention: expected k and v [{batch}, {heads}, Nk, {dim}] for q {tuple(q.shape)}, got "
            f"k {tuple(k.shape)} and v {tuple(v.shape)}"
        )
    if plan.q_blocks.tokens != tokens or plan.k_blocks.tokens != k.shape[2]:
        raise PlanError(
            f"block_attention: the plan is for {plan.q_blocks.tokens} queries and {plan.k_blocks.tokens} keys, "
            f"got {tokens} and {k.shape[2]}"
        )
    if plan.indices.shape[0] not in (1, batch) or plan.indices.shape[1] not in (1, heads):
        raise PlanError(
            f"block_attention: the plan has batch x heads {tuple(plan.indices.shape[:2])}; expected "
            f"1 or {batch} and 1 or {heads}"
        )
    if kv_len is not None and (kv_len.shape != (batch,) or torch.is_floating_point(kv_len)):
        raise PlanError(f"block_attention: expected integer kv_len [{batch}], got {kv_len.dtype} {tuple(kv_len.shape)}")
