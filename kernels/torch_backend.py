"""The fast path on the CPU: gather a few rows of key blocks into small reused buffers, one attention call per chunk.

One big gather would be slower than dense attention; buffers that stay in the cache are what makes it pay.
Axis legend: R = B * H * nq rows (one per query block), C key blocks of a chunk, T = tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.padding import from_blocks, real_slots, to_blocks
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import Remainder
from dit_accel.plan import BlockPlan

_ROW_TOKENS = 512  # query tokens per chunk: 8 rows at block 64, 4 at block 128


@dataclass(frozen=True)
class _Blocks:
    """Operands in blocks: q `[R, Tq, D]`, k and v `[B*H*nk, Tk*D]`, and for each row its lists.

    `columns` `[R, C]` index into k and v, `counts` `[R]`; `real` `[B*H*nk, Tk]` bool or None when every slot is real.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    columns: Tensor
    counts: Tensor
    real: Tensor | None
    k_size: int
    k_count: int
    plan: BlockPlan
    heads: int
    scale: float


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: BlockPlan,
    *,
    scale: float,
    remainder: Remainder | None,
    kv_len: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`. Half precision is computed in fp32."""
    batch, heads, _, dim = q.shape
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    blocks = _prepare(q.to(work), k.to(work), v.to(work), plan, scale, kv_len)
    summary = None if remainder is None else _Summary.of(blocks, remainder)
    out, lse = torch.empty_like(blocks.q), blocks.q.new_empty(blocks.q.shape[:2])
    # Rows of like length share a chunk, so that almost nothing is padded.
    order = torch.argsort(blocks.counts, stable=True)
    lengths = blocks.counts[order].tolist()
    rows = max(1, _ROW_TOKENS // plan.q_blocks.size)
    buffers = tuple(blocks.k.new_empty(rows * lengths[-1], blocks.k.shape[1]) for _ in range(2))
    for first in range(0, len(lengths), rows):
        chunk, wide = order[first : first + rows], lengths[min(first + rows, len(lengths)) - 1]
        part, part_lse = _chunk(blocks, chunk, wide, lengths[first] < wide, buffers, summary)
        out.index_copy_(0, chunk, part)
        lse.index_copy_(0, chunk, part_lse)
    shape = (batch, heads, plan.q_blocks.count, plan.q_blocks.size)
    return from_blocks(out.view(*shape, dim), plan.q_blocks).to(q.dtype), from_blocks(lse.view(shape), plan.q_blocks)


def _prepare(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, kv_len: Tensor | None) -> _Blocks:
    batch, heads, tokens, dim = k.shape
    count, size = plan.k_blocks.count, plan.k_blocks.size
    real_tokens = None if kv_len is None else torch.arange(tokens, device=k.device) < kv_len.unsqueeze(-1)
    keys, values = (to_blocks(x, plan.k_blocks, real_tokens).view(-1, size * dim) for x in (k, v))
    real = None
    if kv_len is not None or count * size != tokens:
        real = real_slots(plan.k_blocks, kv_len, k.device).unsqueeze(1).expand(batch, heads, count, size)
        real = real.reshape(-1, size)
    base = (torch.arange(batch * heads, device=k.device) * count).view(batch, heads, 1, 1)
    # Entries that do not count point to block 0 and are masked.
    columns = torch.where(plan.valid, plan.indices, 0).long() + base
    counts = plan.counts.expand(batch, heads, -1).reshape(-1)
    rows = to_blocks(q, plan.q_blocks).view(-1, plan.q_blocks.size, dim)
    return _Blocks(rows, keys, values, columns.view(len(rows), -1), counts, real, size, count, plan, heads, scale)


def _chunk(
    blocks: _Blocks, rows: Tensor, wide: int, is_ragged: bool, buffers: tuple[Tensor, ...], summary: _Summary | None
) -> tuple[Tensor, Tensor]:
    """Attention of query blocks `rows` `[r]` over their first `wide` key blocks: `[r, Tq, D]` and `[r, Tq]`."""
    index = blocks.columns[rows, :wide]
    flat, size, dim = index.flatten(), blocks.k_size, blocks.q.shape[-1]
    k, v = (buffer[: len(flat)] for buffer in buffers)
    torch.index_select(blocks.k, 0, flat, out=k)
    torch.index_select(blocks.v, 0, flat, out=v)
    k, v = k.view(len(rows), wide * size, dim), v.view(len(rows), wide * size, dim)
    q = blocks.q[rows]
    keep = _keep(blocks, rows, index, wide, is_ragged)
    bias = None
    if keep is not None:
        bias = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, -torch.inf)
    if summary is not None:
        k, v, bias = summary.append(q, k, v, bias, rows)
    out, lse = _attend(q, k, v, bias, blocks.scale)
    if bias is not None:
        # Library kernels disagree about rows without keys; here they are 0 and -inf.
        empty = bias.isneginf().all(-1).expand(lse.shape)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _keep(blocks: _Blocks, rows: Tensor, index: Tensor, wide: int, is_ragged: bool) -> Tensor | None:
    """Which gathered keys count, bool `[r, 1 or Tq, wide * Tk]`; None: all of them."""
    keep = None
    if is_ragged:
        listed = torch.arange(wide, device=index.device) < blocks.counts[rows].unsqueeze(-1)
        keep = listed.repeat_interleave(blocks.k_size, dim=-1).unsqueeze(1)
    if blocks.real is not None:
        real = blocks.real[index].flatten(1).unsqueeze(1)
        keep = real if keep is None else keep & real
    if blocks.plan.predicate is not None:
        inside = _predicate(blocks, rows, index, wide)
        keep = inside if keep is None else keep & inside
    return keep


def _predicate(blocks: _Blocks, rows: Tensor, index: Tensor, wide: int) -> Tensor:
    """What the token predicate keeps of the partial blocks, and all of the full ones: `[r, Tq, wide * Tk]`."""
    plan = blocks.plan
    assert plan.predicate is not None
    assert plan.full_counts is not None
    q_start, q_length = (x[rows % plan.q_blocks.count].unsqueeze(-1) for x in plan.q_blocks.on(rows.device))
    k_start, k_length = (x[index % blocks.k_count].unsqueeze(-1) for x in plan.k_blocks.on(rows.device))
    queries = q_start + torch.arange(plan.q_blocks.size, device=rows.device).minimum(q_length - 1)
    keys = k_start + torch.arange(blocks.k_size, device=rows.device).minimum(k_length - 1)
    inside = plan.predicate.keeps(queries.long(), keys.flatten(1).long())
    batch = len(blocks.counts) // (blocks.heads * plan.q_blocks.count)
    full = plan.full_counts.expand(batch, blocks.heads, -1).reshape(-1)[rows]
    whole = torch.arange(wide, device=rows.device) < full.unsqueeze(-1)
    return inside | whole.repeat_interleave(blocks.k_size, dim=-1).unsqueeze(1)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Dense attention of a chunk, q `[r, Tq, D]`, k and v `[r, S, D]`, with its log-sum-exp `[r, Tq]`."""
    if q.device.type == "cpu":
        mask = None if bias is None else bias.expand(-1, q.shape[1], -1).unsqueeze(0)
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), 0.0, False, attn_mask=mask, scale=scale
        )
        return out[0], lse[0].to(q.dtype)
    logits = torch.bmm(q, k.transpose(1, 2)) * scale
    logits = logits if bias is None else logits + bias
    lse = logits.logsumexp(-1)
    return torch.bmm((logits - lse.unsqueeze(-1)).exp(), v), lse


@dataclass(frozen=True)
class _Summary:
    """Statistics of all key blocks: mean key, mean value and variance `[B*H, nk, D]`, log count `[B*H, nk]`."""

    mean_k: Tensor
    mean_v: Tensor
    variance: Tensor | None
    log_count: Tensor
    selected: Tensor
    rows_per_head: int
    scale: float

    @classmethod
    def of(cls, blocks: _Blocks, remainder: Remainder) -> _Summary:
        """One pass over k and v; blocks are divided by their count of real tokens."""
        dim, size, count = blocks.q.shape[-1], blocks.k_size, blocks.k_count
        k, v = (x.view(-1, size, dim) for x in (blocks.k, blocks.v))
        real = torch.ones(len(k), size, device=k.device, dtype=k.dtype) if blocks.real is None else blocks.real.to(k)
        tokens = real.sum(-1, keepdim=True)
        mean_k, mean_v = (x.sum(1) / tokens.clamp(min=1) for x in (k, v))
        variance = None
        if remainder.mass == "diagonal":
            spread = (k - mean_k.unsqueeze(1)).square_() * real.unsqueeze(-1)
            variance = (spread.sum(1) / tokens.clamp(min=1)).view(-1, count, dim)
        head = blocks.columns // count * count
        listed = torch.arange(blocks.columns.shape[1], device=k.device) < blocks.counts.unsqueeze(-1)
        column = torch.where(listed, blocks.columns - head, count)
        selected = torch.zeros(len(column), count + 1, dtype=torch.bool, device=k.device).scatter_(1, column, True)
        shape = (-1, count, dim)
        return cls(
            mean_k.view(shape),
            mean_v.view(shape),
            variance,
            tokens.log().view(-1, count),
            selected[:, :-1],
            blocks.plan.q_blocks.count,
            blocks.scale,
        )

    def append(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Add the summary keys of unselected blocks behind the gathered keys, with their log-mass as bias."""
        head = rows // self.rows_per_head
        mass = self.log_count[head].unsqueeze(1).expand(-1, q.shape[1], -1)
        if self.variance is not None:
            second = 0.5 * torch.bmm((self.scale * q).square(), self.variance[head].transpose(1, 2))
            mass = mass + torch.minimum(second, mass)
        mass = mass.masked_fill(self.selected[rows].unsqueeze(1), -torch.inf)
        exact = q.new_zeros(len(q), 1, k.shape[1]) if bias is None else bias
        joined = torch.cat([exact.expand(-1, q.shape[1], -1), mass], -1)
        return torch.cat([k, self.mean_k[head]], 1), torch.cat([v, self.mean_v[head]], 1), joined


def _why_not(request: Request) -> str | None:
    if not request.dtype.is_floating_point:
        return f"dtype {request.dtype} is not a floating-point type"
    return None


BACKEND = Backend("torch", run, _why_not, priority=1, break_even=0.7)
