"""Scores of pairs of blocks in Triton: what a selection ranks, with no tensor of tokens by tokens on the way.

The plain forms are in `dit_accel.selection`, which calls these where they run. Axis legend: B batch, H heads,
N tokens, D head size, nq / nk query / key blocks, S slots of a block, R slots of all blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.operations import register_operation
from dit_accel.kernels.triton_configs import DOT_OF, next_power_of_two, pad_head_dim

# Largest temporary, in numbers: what slots of queries see of blocks of keys, for some heads at a time.
_NUMBERS = 2**26
_ROWS_PER_PROGRAM, _NUMBERS_PER_STEP = 16, 4096


@dataclass(frozen=True, eq=False)
class Slots:
    """Which tokens of every block enter a product: S slots to a block, each a run of neighbouring tokens.

    Args:
        x: `[B, H, N, D]`, queries or keys.
        at: int32 `[B or 1, H or 1, n, S]`, first token of every slot.
        count: int32 like `at`, how many tokens it has; 0: the row is zero.
        weight: fp32 like `at`, what a slot counts for in a sum; 0: nothing.
    """

    x: Tensor
    at: Tensor
    count: Tensor
    weight: Tensor

    def padded(self) -> Slots:
        """The same with a power of two of slots, and x with its channels side by side."""
        more = next_power_of_two(self.at.shape[-1]) - self.at.shape[-1]
        x = self.x if self.x.stride(-1) == 1 else self.x.contiguous()
        at, count, weight = (torch.nn.functional.pad(part, (0, more)) for part in (self.at, self.count, self.weight))
        return Slots(x, at.contiguous(), count.contiguous(), weight.contiguous())

    def of_heads(self, heads: slice) -> Slots:
        """Some of the heads."""
        own = slice(None) if self.at.shape[1] == 1 else heads
        x, parts = self.x[:, heads], (part[:, own] for part in (self.at, self.count, self.weight))
        return Slots(x, *(part.contiguous() for part in parts))


def max_slots(dtype: torch.dtype) -> int:
    """The most slots of a block that a program pools in registers, for tensors of `dtype`."""
    return _tile(dtype)[0]


def _tile(dtype: torch.dtype) -> tuple[int, int]:
    """Slots of queries, and of keys, of one program, and the channels that it multiplies at a time."""
    return (64, 32) if dtype == torch.float32 else (128, 64)


def score_blocks(
    queries: Slots,
    keys: Slots,
    *,
    stride: int = 1,
    largest: bool = False,
    relative: bool = False,
    has_partial: bool = False,
    norms: Tensor | None = None,
    given: bool = False,
) -> Tensor:
    """Pool the logits of all pairs of slots of each pair of blocks, fp32 `[B, H, nq, nk]`.

    The logit of two slots is the mean of the products of their tokens along the antidiagonal over sqrt(D): the first
    query meets the last key. In natural logarithm; -inf at a key block whose slots all weigh nothing.

    Args:
        queries, keys: at most `max_slots` to a block.
        stride: tokens of a full slot.
        largest: pool by the largest logit, not by ln Σ weight · exp; needs `relative`, and weights are 0 or 1.
        relative: take what a query slot gives to all key blocks together from it first: the largest, or the
            log-sum-exp, so that a score is the logarithm of a mass.
        has_partial: some slots hold fewer than `stride` tokens; missing ones then stand at the mean of the others.
        norms: fp32 `[B, H, nq, S]`, with `relative`: what was taken from each query slot goes there.
        given: take what stands in `norms` from them instead, but at least their own less 60.
    """
    queries, keys = queries.padded(), keys.padded()
    batch, heads = queries.x.shape[:2]
    (rows, group), blocks = queries.at.shape[2:], keys.at.shape[2]
    taken: Tensor | None = None
    if norms is not None:
        taken = torch.nn.functional.pad(norms, (0, group - norms.shape[-1])).contiguous()
    scores = torch.empty(batch, heads, rows, blocks, dtype=torch.float32, device=queries.x.device)
    with torch.cuda.device_of(queries.x):
        if not relative:
            _launch(queries, keys, scores, stride, largest, has_partial, pool_rows=True)
            return scores
        step = max(1, _NUMBERS // (batch * rows * group * blocks))
        for first in range(0, heads, step):
            some = slice(first, min(first + step, heads))
            own = queries.of_heads(some)
            seen = scores.new_empty(batch, own.x.shape[1], rows * group, blocks)
            _launch(own, keys.of_heads(some), seen, stride, largest, has_partial, pool_rows=False)
            parts = (scores[:, some], None if taken is None else taken[:, some])
            _pool(seen, own, parts[0], parts[1], largest, given)
    if norms is not None and taken is not None and not given:
        norms.copy_(taken[..., : norms.shape[-1]])
    return scores


def _pool(seen: Tensor, queries: Slots, out: Tensor, norms: Tensor | None, largest: bool, given: bool) -> None:
    """Pool `seen` `[B, h, R, nk]` over the slots of query blocks into `out` and `norms`, both parts of tensors."""
    from dit_accel.kernels.triton_scores import pool_slots

    rows, group = queries.at.shape[2:]
    pooled, taken = out.contiguous(), None if norms is None else norms.contiguous()
    pool_slots[rows, seen.shape[1], seen.shape[0]](
        seen, queries.weight.log2(), pooled, taken, *_shared_strides(queries.at), seen.shape[-1],
        GROUP_M=group, COLUMNS=max(16, _NUMBERS_PER_STEP // group), LARGEST=largest,
        NORMS=0 if norms is None else 1 + given, num_warps=4 if group < 32 else 8,
    )  # fmt: skip
    for whole, part in ((out, pooled), (norms, taken)):
        if whole is not None and part is not None and whole is not part:
            whole.copy_(part)


def _launch(
    queries: Slots, keys: Slots, out: Tensor, stride: int, largest: bool, has_partial: bool, pool_rows: bool
) -> None:
    from dit_accel.kernels.triton_scores import slot_scores

    q, k, width = queries.x, keys.x, pad_head_dim(queries.x.shape[-1])
    tile, piece = _tile(q.dtype)
    rows, columns = (side.at.shape[2] * side.at.shape[3] for side in (queries, keys))
    means = [_partial_means(side, stride) if has_partial else None for side in (queries, keys)]
    grid = (-(-rows // tile) * -(-columns // tile), q.shape[1], q.shape[0])
    slot_scores[grid](
        q, queries.at, queries.count, queries.weight.log2(), means[0],
        k, keys.at, keys.count, keys.weight.log2(), means[1], out, q.shape[-1] ** -0.5,
        *q.stride()[:3], *k.stride()[:3], *_shared_strides(queries.at), *_shared_strides(keys.at),
        rows, columns, stride,
        HEAD_DIM=q.shape[-1], PADDED_DIM=width, BLOCK_M=tile, BLOCK_N=tile, SLICE=min(piece, width),
        GROUP_M=queries.at.shape[3], GROUP_N=keys.at.shape[3],
        LARGEST=largest, POOL_ROWS=pool_rows, PARTIAL=has_partial, DOT=DOT_OF[q.dtype],
        num_warps=8, num_stages=2 if has_partial else 3,
    )  # fmt: skip


def _partial_means(side: Slots, stride: int) -> Tensor:
    """Means of the slots that are neither empty nor full, `[B, H, R, P]`; the others hold anything."""
    from dit_accel.kernels.triton_scores import partial_means

    x, width, rows = side.x, pad_head_dim(side.x.shape[-1]), side.at.shape[2] * side.at.shape[3]
    means = x.new_empty(*x.shape[:2], rows, width)
    partial_means[-(-rows // _ROWS_PER_PROGRAM), x.shape[1], x.shape[0]](
        x, side.at, side.count, means, *x.stride()[:3], *_shared_strides(side.at), rows, stride,
        HEAD_DIM=x.shape[-1], PADDED_DIM=width, ROWS=_ROWS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return means


def _shared_strides(x: Tensor) -> tuple[int, int]:
    """Strides of batch and heads of a contiguous tensor, 0 along an axis of size 1, which is shared."""
    size = x.shape[2:].numel()
    return (0 if x.shape[0] == 1 else x.shape[1] * size, 0 if x.shape[1] == 1 else size)


def _check(device: torch.device, dtype: torch.dtype) -> str | None:
    """Five blocks of three slots of two tokens; the last slots are empty in one item, and one is short in the other."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 2, 30, 24, generator=generator).to(device, dtype) for _ in range(2))
    at = torch.arange(0, 30, 2, dtype=torch.int32, device=device).view(1, 1, 5, 3).repeat(2, 1, 1, 1)
    count = torch.full_like(at, 2)
    count[1, 0, 4, 2], count[0, 0, 4, 1:] = 1, 0
    rows, columns = (_tokens_of(x, count) for x in (q, k))
    logits = (rows.flatten(3) @ columns.flip(3).flatten(3).transpose(-1, -2)) * (24**-0.5 / 2)
    for largest, relative in ((False, True), (False, False), (True, True)):
        weight = (count > 0).float() if largest else count / 2
        sides = [Slots(x, at, count, weight) for x in (q, k)]
        got = score_blocks(*sides, stride=2, largest=largest, relative=relative, has_partial=True)
        level = weight.double().log().view(2, 1, 15)
        wanted = logits + level.unsqueeze(-2)
        if relative:
            wanted = wanted - (wanted.amax(-1, keepdim=True) if largest else wanted.logsumexp(-1, keepdim=True))
        wanted = (wanted + level.unsqueeze(-1)).unflatten(-1, (5, 3)).unflatten(2, (5, 3))
        wanted = wanted.amax((3, 5)) if largest else wanted.logsumexp((3, 5))
        if not float((got.double() - wanted).abs().max()) < 1e-2:
            return "its largest logits are wrong" if largest else "its log-sums are wrong"
    return None


def _tokens_of(x: Tensor, count: Tensor) -> Tensor:
    """The tokens of the slots of `_check` in fp64 `[B, H, 15, 2, D]`, missing ones at the mean of their slot."""
    tokens, count = x.double().unflatten(2, (15, 2)), count.view(2, 1, 15, 1, 1)
    return torch.where(count == 1, tokens[:, :, :, :1], tokens).masked_fill(count == 0, 0)


register_operation("block scores", _check)
