"""From scores of key blocks to indices and counts, and tokens into an order and back: Triton where it runs, else torch.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_accel.errors import PlanError
from dit_accel.kernels.triton_backend import is_interpreted
from dit_accel.kernels.triton_configs import next_power_of_two, pad_head_dim
from dit_accel.kernels.triton_operands import launch_statistics, tokens_of
from dit_accel.plan import Blocking

_RULES = {"top_k": 0, "top_p": 1, "threshold": 2}
_LONGEST_ROW = 16384  # scores that the registers of one program hold
_ROWS_PER_PROGRAM = 64


@dataclass(frozen=True)
class Rule:
    """How many key blocks a row keeps.

    Args:
        kind: "top_k": the `value` best, forced ones among them; "top_p": the fewest whose softmax adds up to `value`,
            forced ones first; "threshold": those whose softmax is at least `value`, and the forced ones.
        value: a count of blocks for "top_k", else a share in (0, 1].

    Raises:
        PlanError: `value` is out of range.
    """

    kind: Literal["top_k", "top_p", "threshold"]
    value: float

    def __post_init__(self) -> None:
        right = self.value >= 1 and self.value == int(self.value) if self.kind == "top_k" else 0 < self.value <= 1
        if not right:
            wanted = "a count of at least 1" if self.kind == "top_k" else "a share in (0, 1]"
            raise PlanError(f"Rule.value: expected {wanted} for {self.kind!r}, got {self.value}")


def runs_triton(x: Tensor) -> bool:
    """Whether the Triton kernels of this module can compute on x: on CUDA, or on the CPU in the interpreter."""
    return x.is_cuda or (x.device.type == "cpu" and is_interpreted())


def pooled_means(q: Tensor, k: Tensor, blocks: Blocking, kv_len: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Means of the query and key blocks in one launch.

    Args:
        q, k: `[B, H, N, D]`, of one length.
        blocks: partition of both.
        kv_len: int `[B]`, real tokens per item. None: all.

    Returns:
        Means of q and k, fp32 `[B, H, n, D]`, 0 for a block without real tokens; real tokens per block, int32
        `[B or 1, n]`.
    """
    kv_len = None if kv_len is None else kv_len.to(torch.int32)
    tokens = tokens_of(blocks, kv_len, q.device)
    if not runs_triton(q):
        owner = blocks.block_of_token().to(q.device)
        means = [_means(x, owner, blocks.count, tokens, kv_len) for x in (q, k)]
    else:
        shape = (*q.shape[:2], blocks.count, pad_head_dim(q.shape[-1]))
        means = [torch.empty(shape, dtype=torch.float32, device=q.device) for _ in range(2)]
        with torch.cuda.device_of(q):
            launch_statistics(q, k, blocks, kv_len, means)
        means = [x[..., : q.shape[-1]] for x in means]
    return means[0], means[1], tokens


def _means(x: Tensor, owner: Tensor, count: int, tokens: Tensor, kv_len: Tensor | None) -> Tensor:
    x = x.float()
    if kv_len is not None:
        outside = torch.arange(x.shape[2], device=x.device) >= kv_len.unsqueeze(-1)
        x = x.masked_fill(outside[:, None, :, None], 0)
    sums = x.new_zeros(*x.shape[:2], count, x.shape[3]).index_add_(2, owner, x)
    return sums / tokens.clamp(min=1)[:, None, :, None]


def pooled_scores(mean_q: Tensor, mean_k: Tensor, tokens: Tensor, scale: float) -> Tensor:
    """Log-mass of each key block for the mean query of each query block, fp32 `[B, H, nq, nk]`.

    scale * q̄·k̄ + ln n for a block of n real tokens, -inf for one without. Means fp32 `[B, H, n, D]`, tokens
    `[B or 1, nk]`. Scores stay in fp32: rounded ones tie, and ties favour early blocks.
    """
    scores = torch.matmul(mean_q, mean_k.transpose(-1, -2)).mul_(scale)
    return scores.add_(tokens.float().log()[:, None, None, :])


def select_blocks(
    scores: Tensor, rule: Rule, forced: Tensor | None = None, width: int | None = None
) -> tuple[Tensor, Tensor]:
    """The key blocks that each row keeps; ties go to the lower index, and nothing waits for the device.

    Args:
        scores: fp32 `[B, H, nq, nk]`; -inf where a block must not be kept. A row of -inf keeps the block of its number.
        rule: how many.
        forced: bool `[nq, nk]`, blocks that are kept whatever their score, unless that is -inf.
        width: columns of the result; a row that keeps more is cut to its first. Default nk, so that none is.

    Returns:
        indices int32 `[B, H, nq, width]`, ascending; entries beyond the count are 0. counts int32 `[B, H, nq]`.
    """
    *lead, rows, columns = scores.shape
    if forced is not None and forced.shape != (rows, columns):
        raise PlanError(f"select_blocks: expected forced [{rows}, {columns}], got {tuple(forced.shape)}")
    width = columns if width is None else min(width, columns)
    if not runs_triton(scores) or columns > _LONGEST_ROW:
        return _select_sorted(scores, rule, forced, width)
    from dit_accel.kernels.triton_selection import select

    scores = scores.float().contiguous()
    indices = torch.zeros(*lead, rows, width, dtype=torch.int32, device=scores.device)
    counts = torch.empty(*lead, rows, dtype=torch.int32, device=scores.device)
    columns_padded = max(16, next_power_of_two(columns))
    with torch.cuda.device_of(scores):
        select[(counts.numel(),)](
            scores, None if forced is None else forced.contiguous().view(torch.uint8), indices, counts,
            rows, columns, int(rule.value) if rule.kind == "top_k" else 0, width, float(rule.value),
            COLUMNS=columns_padded, RULE=_RULES[rule.kind], HAS_FORCED=forced is not None,
            num_warps=4 if columns_padded <= 2048 else 8,
        )  # fmt: skip
    return indices, counts


def _select_sorted(scores: Tensor, rule: Rule, forced: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The same with a sort of each row, for devices without Triton."""
    rows, columns = scores.shape[-2:]
    possible = ~scores.isneginf()
    always = torch.zeros_like(possible) if forced is None else forced & possible
    share = torch.softmax(scores, -1).nan_to_num(0.0)
    order = scores.masked_fill(always, torch.inf).argsort(dim=-1, descending=True, stable=True)
    if rule.kind == "top_k":
        kept = torch.arange(columns, device=scores.device).expand_as(order) < rule.value
    elif rule.kind == "top_p":
        sorted_share = share.gather(-1, order)
        kept = sorted_share.cumsum(-1) - sorted_share < rule.value
    else:
        kept = share.gather(-1, order) >= rule.value
    mask = (torch.zeros_like(possible).scatter_(-1, order, kept) & possible) | always
    own = torch.arange(rows, device=scores.device).clamp(max=columns - 1)
    mask |= ~mask.any(-1, keepdim=True) & torch.nn.functional.one_hot(own, columns).bool()
    counts = mask.sum(-1, dtype=torch.int32).clamp(max=width)
    indices = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width].to(torch.int32)
    return indices.masked_fill_(torch.arange(width, device=mask.device) >= counts.unsqueeze(-1), 0), counts


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """`out[..., p, :] = x[..., index[p], :]`. x `[B, H, N, D]`; index int64 `[N]` or `[B or 1, H or 1, N]`."""
    return _move(x, index, scatter=False)


def scatter_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Undo `gather_tokens` with the same permutation: `out[..., index[p], :] = x[..., p, :]`."""
    return _move(x, index, scatter=True)


def _move(x: Tensor, index: Tensor, scatter: bool) -> Tensor:
    index = index if index.ndim == 3 else index.view(1, 1, -1)
    if index.shape[-1] != x.shape[2]:
        raise PlanError(f"gather_tokens: expected a permutation of {x.shape[2]} tokens, got {index.shape[-1]}")
    if not runs_triton(x):
        where = index.expand(*x.shape[:3]).unsqueeze(-1).expand_as(x)
        return torch.empty_like(x).scatter_(2, where, x) if scatter else x.gather(2, where)
    from dit_accel.kernels.triton_selection import move_rows

    x, index, out = (x if x.stride(-1) == 1 else x.contiguous()), index.contiguous(), torch.empty_like(x)
    index_b, index_h = (0 if n == 1 else s for n, s in zip(index.shape[:2], index.stride()[:2], strict=True))
    grid = (-(-x.shape[2] // _ROWS_PER_PROGRAM), x.shape[1], x.shape[0])
    with torch.cuda.device_of(x):
        move_rows[grid](
            x, out, index, *x.stride()[:3], *out.stride()[:3], index_b, index_h, x.shape[2],
            DIM=x.shape[-1], PADDED_DIM=pad_head_dim(x.shape[-1]), ROWS=_ROWS_PER_PROGRAM, SCATTER=scatter,
        )  # fmt: skip
    return out
