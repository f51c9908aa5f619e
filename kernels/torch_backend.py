"""The fast path on the CPU: gather a few rows of key blocks into small reused buffers, one attention call per chunk.

One big gather would be slower than dense attention; buffers that stay in the cache are what makes it pay.
Axis legend: G = B * H heads, nq / nk query / key blocks, R = G * nq rows (one per query block), C selected key blocks
of the longest row, Tq / Tk tokens per query / key block, r rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dit_accel.kernels.chunk import attend_chunk
from dit_accel.kernels.padding import from_blocks, real_slots, to_blocks
from dit_accel.kernels.products import is_bfloat16_fast, wide_products
from dit_accel.kernels.quantize import mean_token, round_to_fp8, round_to_int8
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.remainder import Summary, add_remainder
from dit_accel.kernels.spec import AttentionCall, Precision, Remainder
from dit_accel.plan import BlockPlan

# Gathered keys and values per thread: larger chunks leave the cache, smaller ones synchronise the threads too often.
_CHUNK_BYTES = 4 << 20

# What is to be done about an entry of a row; entries stand in this order, so that only the last need a mask.
_WHOLE, _PADDED, _PARTIAL, _VOID = range(4)


@dataclass(frozen=True)
class _Operands:
    """What a chunk reads: q `[R, Tq, D]`; keys, values `[G * nk, Tk, D]`; real bool `[G * nk, Tk]`, None: every slot.

    `fp8`: weights are rounded to e4m3; values in bfloat16 round them to that.
    """

    q: Tensor
    keys: Tensor
    values: Tensor
    real: Tensor | None
    scale: float
    fp8: bool = False


@dataclass(frozen=True)
class _Rows:
    """The lists of key blocks: columns int64 `[R, C]` into the G * nk blocks, and their kinds `[R, C]`.

    `counts` and `whole` `[R]` say how many leading entries have a key to attend, and how many need no mask;
    `items` `[R]` which boxes of the predicate a row has, None: all the same; `blocks` `[R]` its query block.
    """

    blocks: Tensor
    columns: Tensor
    kinds: Tensor
    counts: Tensor
    whole: Tensor
    items: Tensor | None

    def at(self, index: Tensor | slice) -> _Rows:
        """Some of the rows, in the order of `index`."""
        items = None if self.items is None else self.items[index]
        lists = self.columns[index], self.kinds[index]
        return _Rows(self.blocks[index], *lists, self.counts[index], self.whole[index], items)


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`.

    Half precision is computed in fp32, but where bfloat16 products are faster, weights and values are multiplied so.
    """
    plan, scale, precision, kv_len = call.plan, call.scale, call.precision or Precision(), call.kv_len
    batch, heads, tokens, dim = k.shape
    dtype, work = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
    q = q.to(work)
    real = None if kv_len is None else torch.arange(tokens, device=k.device) < kv_len.unsqueeze(-1)
    # One vector taken from every key of a head moves all logits of a query alike: the softmax does not see it. One
    # taken from every value is taken from every output, since weights sum to one.
    shift = mean_token(k.to(work), real) if precision.qk == "int8" and precision.smooth_k else None
    offset = mean_token(v.to(work), real) if precision.pv == "fp8" else None
    operands = _prepare(q, k if shift is None else k - shift, v if offset is None else v - offset, plan, scale, real)
    exact = _quantized(operands, precision, batch * heads)
    if dtype == torch.bfloat16 and precision.pv == "input" and is_bfloat16_fast(q.device):
        exact = replace(exact, values=exact.values.to(dtype))
    rows = _lists(plan, batch, heads, exact, precision.skip)
    with wide_products(q.device):
        out, lse = _attend_exact(exact, rows, plan)
        if call.remainder is not None:
            _attend_rest(operands, out, lse, plan, call.remainder, batch, heads)
    shape = (batch, heads, plan.q_blocks.count, plan.q_blocks.size)
    out, lse = from_blocks(out.view(*shape, dim), plan.q_blocks), from_blocks(lse.view(shape), plan.q_blocks)
    if offset is not None:
        out = (out + offset).masked_fill(lse.isneginf().unsqueeze(-1), 0)
    if shift is not None:
        lse = lse + scale * (q * shift).sum(-1)
    return out.to(dtype), lse


def _quantized(operands: _Operands, precision: Precision, groups: int) -> _Operands:
    """What the exact part computes with, for G = `groups` heads."""
    q, keys, values = operands.q, operands.keys, operands.values
    if precision.qk == "int8":
        q, keys = round_to_int8(q), round_to_int8(keys)
    if precision.pv == "fp8":
        # One scale for all blocks of a head.
        values = round_to_fp8(values.reshape(groups, -1, values.shape[-1])).view(values.shape)
    return replace(operands, q=q, keys=keys, values=values, fp8=precision.pv == "fp8")


def _prepare(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, scale: float, real: Tensor | None) -> _Operands:
    """Tokens into blocks, in the dtype of q; what is not a real key, bool `[B, Nk]`, becomes zero."""
    batch, heads, tokens, dim = k.shape
    count, size = plan.k_blocks.count, plan.k_blocks.size
    keys, values = (to_blocks(x.to(q.dtype), plan.k_blocks, real).view(-1, size, dim) for x in (k, v))
    slots = None
    if real is not None or count * size != tokens:
        slots = real_slots(plan.k_blocks, None if real is None else real.sum(-1), k.device)
        slots = slots.unsqueeze(1).expand(batch, heads, count, size).reshape(-1, size)
    queries = to_blocks(q, plan.q_blocks).view(-1, plan.q_blocks.size, dim)
    return _Operands(queries, keys, values, slots, scale)


def _lists(plan: BlockPlan, batch: int, heads: int, operands: _Operands, skip: float | None) -> _Rows:
    """The plan as one list per row: entries sorted by what they need, those without a real key, or skipped, last."""
    nq, nk = plan.q_blocks.count, plan.k_blocks.count
    device, valid = plan.indices.device, plan.valid
    # Entries that do not count may hold anything; block 0 is always there to point to.
    columns = torch.where(valid, plan.indices, 0).long()
    columns = columns + (torch.arange(batch * heads, device=device) * nk).view(batch, heads, 1, 1)
    columns = columns.view(batch * heads * nq, -1)
    kinds = torch.zeros_like(plan.indices, dtype=torch.int8)
    if plan.full_counts is not None:
        position = torch.arange(kinds.shape[-1], device=device)
        kinds.masked_fill_(position >= plan.full_counts.unsqueeze(-1), _PARTIAL)
    kinds = kinds.masked_fill_(~valid, _VOID).expand(batch, heads, nq, -1).reshape(columns.shape)
    if operands.real is not None:
        filled = operands.real.sum(-1)
        state = (filled < operands.real.shape[-1]).to(torch.int8).masked_fill_(filled == 0, _VOID)
        kinds = kinds.maximum(state[columns])
    items = None
    if plan.predicate is not None and not plan.predicate.is_shared:
        items = plan.predicate.items(batch, heads).repeat_interleave(nq)
    blocks = torch.arange(nq, device=device).repeat(batch * heads)
    if skip is not None:
        _skip_far_tiles(operands, plan, _Rows(blocks, columns, kinds, kinds, kinds, items), skip)
    if operands.real is not None or plan.full_counts is not None or skip is not None:
        kinds, order = kinds.sort(stable=True, dim=-1)
        columns = columns.gather(-1, order)
    return _Rows(blocks, columns, kinds, (kinds < _VOID).sum(-1), (kinds == _WHOLE).sum(-1), items)


def _skip_far_tiles(operands: _Operands, plan: BlockPlan, rows: _Rows, skip: float) -> None:
    """Void the entries whose logits lie far below those before them, in place; see `Precision.skip`.

    Every logit is computed for the sake of the decision: this says what the kernel does, and saves nothing here.
    """
    lengths, kinds = plan.q_blocks.on(rows.kinds.device)[1].long(), rows.kinds
    for row in range(len(kinds)):
        keys = operands.keys[rows.columns[row]]
        logits = operands.scale * torch.einsum("td,csd->tcs", operands.q[row, : lengths[row % len(lengths)]], keys)
        keep = _keep(operands, rows.at(slice(row, row + 1)), plan)[0, : len(logits)]
        keep = keep.unflatten(-1, keys.shape[:2]) & (kinds[row] < _VOID).unsqueeze(-1)
        largest = logits.masked_fill(~keep, -torch.inf).amax(-1)
        before = torch.nn.functional.pad(largest.cummax(1).values, (1, 0), value=-torch.inf)[:, :-1].clamp(min=-1e30)
        kinds[row].masked_fill_(~((largest - before) > -skip).any(0), _VOID)


def _attend_exact(operands: _Operands, rows: _Rows, plan: BlockPlan) -> tuple[Tensor, Tensor]:
    """Attention of every row over its list: `[R, Tq, D]` and `[R, Tq]`; 0 and -inf for a row without keys."""
    # Rows of one chunk stand side by side; those that need a mask stay apart from those that do not.
    kinds, order = (2 * rows.counts + (rows.whole < rows.counts)).sort(stable=True)
    rows, whole = rows.at(order), rows.whole[order].tolist()
    out, lse = torch.zeros_like(operands.q), operands.q.new_full(operands.q.shape[:2], -torch.inf)
    blocks = (operands.keys, operands.values)
    chunks = list(_chunks(kinds, sum(x[0].numel() * x.element_size() for x in blocks)))
    longest = max(((chunk.stop - chunk.start) * wide for chunk, wide in chunks), default=0)
    buffers = [x.new_empty(longest, *x.shape[1:]) for x in blocks]
    for chunk, wide in chunks:
        at, numbers = (min(whole[chunk]), wide), order[chunk]
        q = operands.q.index_select(0, numbers)
        part, part_lse = _attend_chunk(operands, rows.at(chunk), plan, q, at, buffers)
        out.index_copy_(0, numbers, part)
        lse.index_copy_(0, numbers, part_lse)
    return out, lse


def _chunks(kinds: Tensor, block_bytes: int) -> Iterator[tuple[slice, int]]:
    """The rows of each chunk and the length of their lists, the same for all so that none is padded.

    `kinds` `[R]`, ascending, are twice that length, or one more for rows that need a mask.
    """
    budget, start = _CHUNK_BYTES * torch.get_num_threads() // block_bytes, 0
    for kind, size in zip(*(x.tolist() for x in kinds.unique_consecutive(return_counts=True)), strict=True):
        wide, stop = kind // 2, start + size
        if wide:
            step = max(1, budget // wide)
            yield from ((slice(first, min(first + step, stop)), wide) for first in range(start, stop, step))
        start = stop


def _attend_chunk(
    operands: _Operands, rows: _Rows, plan: BlockPlan, q: Tensor, at: tuple[int, int], buffers: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Attention of r rows, q `[r, Tq, D]`, over the leading entries of their lists: `[r, Tq, D]` and `[r, Tq]`.

    `at` says how many of the entries need no mask in any row, and how many there are.
    """
    whole, wide = at
    index = rows.columns[:, :wide].flatten()
    k, v = (
        torch.index_select(x, 0, index, out=buffer[: len(index)]).view(len(q), -1, x.shape[2])
        for x, buffer in zip((operands.keys, operands.values), buffers, strict=True)
    )
    bias = None
    if whole < wide:
        keep = _keep(
            operands, replace(rows, columns=rows.columns[:, whole:wide], kinds=rows.kinds[:, whole:wide]), plan
        )
        bias = k.new_zeros(len(q), keep.shape[1], k.shape[1])
        bias[..., -keep.shape[2] :].masked_fill_(~keep, -torch.inf)
    out, lse = attend_chunk(q, k, v, bias, operands.scale, operands.fp8)
    if bias is not None and whole == 0:
        # Library kernels disagree about queries without keys; here they are 0 and -inf.
        empty = bias.isneginf().all(-1).expand(lse.shape)
        out, lse = out.masked_fill(empty.unsqueeze(-1), 0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def _keep(operands: _Operands, rows: _Rows, plan: BlockPlan) -> Tensor:
    """Which keys of the entries of r rows `[r, c]` count: bool `[r, 1 or Tq, c * Tk]`."""
    index, kinds = rows.columns, rows.kinds
    size = plan.k_blocks.size
    keep = torch.ones(1, 1, 1, dtype=torch.bool, device=index.device).expand(len(index), 1, index.shape[1] * size)
    if operands.real is not None:
        keep = operands.real[index].flatten(1).unsqueeze(1)
    if plan.predicate is None:
        return keep
    q_start, q_length = (x[rows.blocks].unsqueeze(-1) for x in plan.q_blocks.on(index.device))
    k_start, k_length = (x[index % plan.k_blocks.count].unsqueeze(-1) for x in plan.k_blocks.on(index.device))
    # Slots of padding repeat the last token of their block; they are masked by `real`, or cut off afterwards.
    queries = q_start + torch.arange(plan.q_blocks.size, device=index.device).minimum(q_length - 1)
    keys = k_start + torch.arange(size, device=index.device).minimum(k_length - 1)
    queries, keys = queries.long(), keys.flatten(1).long()
    if rows.items is None:
        inside = plan.predicate.keeps(queries, keys)
    else:
        inside = plan.predicate.keeps_of(rows.items, queries, keys)
    return keep & (inside | (kinds < _PARTIAL).repeat_interleave(size, dim=-1).unsqueeze(1))


def _attend_rest(
    operands: _Operands, out: Tensor, lse: Tensor, plan: BlockPlan, remainder: Remainder, batch: int, heads: int
) -> None:
    """Add what was not selected to `out` `[R, Tq, D]` and `lse` `[R, Tq]`, in place."""
    nq, nk, (_, size, dim) = plan.q_blocks.count, plan.k_blocks.count, operands.q.shape
    k, v = (x.view(batch * heads, nk, plan.k_blocks.size, dim) for x in (operands.keys, operands.values))
    real = None if operands.real is None else operands.real.view(k.shape[:3])
    selected = plan.to_mask().expand(batch, heads, -1, -1).reshape(-1, nq, nk)
    q, out, lse = (x.view(batch * heads, nq, size, *x.shape[2:]) for x in (operands.q, out, lse))
    lengths = plan.q_blocks.on(q.device)[1].to(q.dtype)
    add_remainder(q, out, lse, selected, Summary.of(k, v, real, remainder), remainder, operands.scale, lengths)


def _why_not(request: Request) -> str | None:
    if not request.dtype.is_floating_point:
        return f"dtype {request.dtype} is not a floating-point type"
    if request.precision is not None and request.device.type != "cpu":
        if request.precision.skip is not None:
            return "it decides block by block which tiles to skip, which is for tests on the CPU"
        if request.precision.pv == "fp8":
            return "it emulates products in float8_e4m3fn, which is for tests on the CPU"
    return None


BACKEND = Backend("torch", run, _why_not, priority=1, break_even=0.7, needs_self_test=False)
