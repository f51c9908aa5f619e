"""The specification of `block_attention`: O(N²), plain, in float64 when given float64. Fast paths may not import it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.spec import AttentionCall, Precision, Remainder
from dit_accel.plan import Blocking, BlockPlan


def run(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
    """See `BackendFunction`. q `[B, H, Nq, D]`; k, v `[B, H, Nk, D]`."""
    plan, scale, remainder, kv_len = call.plan, call.scale, call.remainder, call.kv_len
    work = q.dtype if q.dtype == torch.float64 else torch.float32
    real = torch.ones(k.shape[0], 1, 1, k.shape[2], dtype=torch.bool, device=k.device)
    if kv_len is not None:
        real = (torch.arange(k.shape[2], device=k.device) < kv_len[:, None]).view(real.shape)
    queries = q.to(work)
    keys, values = (x.to(work).masked_fill(~real.transpose(-1, -2), 0) for x in (k, v))
    mean = _mean_key(keys, real, call.precision)
    # What smoothing takes from every logit of a row is given back, so that the log-sum-exp is that of the keys given.
    offset = scale * (queries * mean).sum(-1)
    logits = scale * _scores(queries, (keys - mean).masked_fill(~real.transpose(-1, -2), 0), plan, call.precision)
    logits = (logits + offset.unsqueeze(-1)).masked_fill(~(plan.to_token_mask() & real), -torch.inf)
    if call.precision is not None and call.precision.skip is not None:
        logits = _without_far_tiles(logits, plan, call.precision.skip)
    if remainder is None:
        lse, weights = _softmax(logits)
        return _weighted(weights, logits, lse, offset, values, real, call.precision).to(q.dtype), lse
    centres = torch.zeros_like(queries) if remainder.about == "key" else _mean_queries(queries, plan.q_blocks)
    extra, summary = _summaries(queries, centres, keys, values, real, plan, scale, remainder)
    lse, weights = _softmax(torch.cat([logits, extra], -1))
    exact, tail = weights.split([keys.shape[2], plan.k_blocks.count], -1)
    out = _weighted(exact, logits, lse, offset, values, real, call.precision)
    out = out + torch.einsum("bhqj,bhqjd->bhqd", tail, summary)
    if remainder.first_order == "mixed":
        tail = _mean_queries(tail, plan.q_blocks)
    if remainder.first_order != "none":
        out = out + scale * _first_order(queries - centres, keys, values, real, plan.k_blocks, tail, remainder)
    return out.to(q.dtype), lse


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and weights of every row; a row without keys has -inf and zeros."""
    lse = logits.logsumexp(-1)
    return lse, (logits - lse.unsqueeze(-1)).exp().masked_fill(lse.isneginf().unsqueeze(-1), 0)


def _mean_queries(x: Tensor, blocks: Blocking) -> Tensor:
    """For every row of `x` `[B, H, Nq, ...]` the mean over the rows of its query block; same shape."""
    return torch.cat([part.mean(2, keepdim=True).expand_as(part) for part in x.split(blocks.lengths.tolist(), 2)], 2)


def _mean_key(k: Tensor, real: Tensor, precision: Precision | None) -> Tensor:
    """What smoothing takes from every key, `[B, H, 1, D]`."""
    if precision is None or precision.qk == "input" or not precision.smooth_k:
        return torch.zeros_like(k[:, :, :1])
    return k.sum(2, keepdim=True) / real.sum(-1, keepdim=True).clamp(min=1)


def _scores(q: Tensor, k: Tensor, plan: BlockPlan, precision: Precision | None) -> Tensor:
    """Unscaled q·k `[B, H, Nq, Nk]` of the exact part, in the arithmetic asked for."""
    if precision is None or precision.qk == "input":
        return q @ k.transpose(-1, -2)
    return _int8(q, plan.q_blocks) @ _int8(k, plan.k_blocks).transpose(-1, -2)


def _weighted(
    weights: Tensor,
    logits: Tensor,
    lse: Tensor,
    offset: Tensor,
    values: Tensor,
    real: Tensor,
    precision: Precision | None,
) -> Tensor:
    """`weights` `[B, H, Nq, Nk]` of the exact part times `values` `[B, H, Nk, D]`, in the arithmetic asked for.

    `offset` `[B, H, Nq]` is what `logits` and `lse` have more than with the keys as smoothed.
    """
    if precision is None or precision.pv == "input":
        return weights @ values
    real = real.transpose(-1, -2)
    mean = values.sum(2, keepdim=True) / real.sum(2, keepdim=True).clamp(min=1)
    centred = (values - mean).masked_fill(~real, 0)
    step = centred.abs().amax(2, keepdim=True) / 448 + 1e-7
    # In this unit the largest weight of a row lies in (128, 256].
    exponent = ((logits.amax(-1) - offset) / math.log(2)).ceil() - 8
    unit = (exponent * math.log(2) + offset - lse).exp().unsqueeze(-1)
    rounded = torch.where(weights > 0, _e4m3(weights / unit) * unit, 0)
    return rounded @ (_e4m3(centred / step) * step) + weights.sum(-1, keepdim=True) * mean


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).to(x.dtype)


def _int8(x: Tensor, blocks: Blocking) -> Tensor:
    """Every block of tokens rounded to 255 levels, as floating-point numbers again. x `[B, H, N, D]`."""
    parts = []
    for part in x.split(blocks.lengths.tolist(), 2):
        step = part.abs().amax((2, 3), keepdim=True) / 127 + 1e-7
        parts.append((part / step + 0.5 * part.sign()).trunc() * step)
    return torch.cat(parts, 2)


def _without_far_tiles(logits: Tensor, plan: BlockPlan, skip: float) -> Tensor:
    """-inf where a selected block lies `skip` below what each query of a query block has seen before in the list."""
    logits = logits.clone()
    queries, keys = plan.q_blocks.starts.tolist(), plan.k_blocks.starts.tolist()
    for item, head, block in torch.cartesian_prod(*(torch.arange(n) for n in (*logits.shape[:2], len(queries) - 1))):
        rows = logits[item, head, queries[block] : queries[block + 1]]
        at = (min(int(item), len(plan.counts) - 1), min(int(head), plan.counts.shape[1] - 1), block)
        top = torch.full_like(rows[:, 0], -1e30)
        for j in plan.indices[at][: plan.counts[at]].tolist():
            tile = rows[:, keys[j] : keys[j + 1]]
            largest = tile.amax(-1)
            if (largest - top).max() <= -skip:
                tile.fill_(-torch.inf)
            top = top.maximum(largest)
    return logits


def _summaries(
    q: Tensor, centre: Tensor, k: Tensor, v: Tensor, real: Tensor, plan: BlockPlan, scale: float, remainder: Remainder
) -> tuple[Tensor, Tensor]:
    """Logits `[B, H, Nq, nk]` of the summary keys and their values `[B, H, Nq, nk, D]`, block by block.

    `centre` is the mean query of every query `[B, H, Nq, D]`, or zero about the mean key, where that is the same.
    """
    selected = plan.to_mask()[..., plan.q_blocks.block_of_token().to(q.device), :]
    logits, values = [], []
    for j in range(plan.k_blocks.count):
        inside = slice(int(plan.k_blocks.starts[j]), int(plan.k_blocks.starts[j + 1]))
        count = real[..., inside].sum(-1).to(q.dtype).unsqueeze(-1)  # [B, 1, 1, 1]
        mean = k[:, :, inside].sum(2, keepdim=True) / count.clamp(min=1)
        seen = (scale * centre @ k[:, :, inside].transpose(-1, -2)).masked_fill(~real[..., inside], -torch.inf)
        mass, weights = _softmax(seen)
        logit = scale * ((q - centre) * mean).sum(-1) + mass
        if remainder.mass == "diagonal":
            spread = (k[:, :, inside] - mean).square() * real[..., inside].transpose(-1, -2)
            variance = spread.sum(2, keepdim=True) / count.clamp(min=1)
            logit = logit + torch.minimum(0.5 * ((scale * q).square() * variance).sum(-1), count.log().squeeze(-1))
        logits.append(logit.masked_fill(selected[..., j] | (count == 0).squeeze(-1), -torch.inf))
        values.append(weights @ v[:, :, inside])
    return torch.stack(logits, -1), torch.stack(values, 3)


def _first_order(
    q: Tensor, k: Tensor, v: Tensor, real: Tensor, blocks: Blocking, tail: Tensor, remainder: Remainder
) -> Tensor:
    """Σ_g (p_g / t_g) q·H_g `[B, H, Nq, D]` from the weights `tail` `[B, H, Nq, nk]` of the summary keys."""
    total, size = torch.zeros_like(q), remainder.blocks_per_group(blocks.count)
    for first in range(0, blocks.count, size):
        covariance, tokens = q.new_zeros(*q.shape[:2], q.shape[3], q.shape[3]), q.new_zeros(len(q), 1, 1, 1)
        for j in range(first, min(first + size, blocks.count)):
            inside = slice(int(blocks.starts[j]), int(blocks.starts[j + 1]))
            here = real[..., inside].transpose(-1, -2)
            count = here.sum(2, keepdim=True).to(q.dtype)
            mean = k[:, :, inside].sum(2, keepdim=True) / count.clamp(min=1)
            covariance += ((k[:, :, inside] - mean) * here).transpose(-1, -2) @ v[:, :, inside]
            tokens += count
        mass = tail[..., first : first + size].sum(-1, keepdim=True) / tokens.clamp(min=1)
        total += mass * (q @ covariance)
    return total


def _why_not(request: Request) -> str | None:
    return None


BACKEND = Backend("reference", run, _why_not, priority=-1, break_even=1.0, needs_self_test=False)
