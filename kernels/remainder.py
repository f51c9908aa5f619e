"""The unselected blocks, as summary keys that join the softmax of the exact part through its log-sum-exp.

Nothing is ever larger than a chunk: neither the summary logits (N x nk) nor the covariances H (nk x D x D).
Axis legend: G = B * H heads, nq / nk query / key blocks, T tokens per block, U query blocks of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dit_accel.kernels.spec import Remainder

_CHUNK_NUMBERS = 1 << 20  # size of the largest temporary, in numbers: 4 MiB in fp32


@dataclass(frozen=True)
class Summary:
    """Statistics of the key blocks; means are over real tokens.

    Args:
        k, v: the blocks `[G, nk, T, D]`, padding zero.
        real: 1 for a real token and 0 for padding `[G, nk, T]`, in the dtype of k; None when no slot is padding.
        mean_k, mean_v: `[G, nk, D]`.
        tokens: number of real tokens `[G, nk]`.
        variance: of the keys, per channel `[G, nk, D]`; None when the mass is not corrected.
    """

    k: Tensor
    v: Tensor
    real: Tensor | None
    mean_k: Tensor
    mean_v: Tensor
    tokens: Tensor
    variance: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, real: Tensor | None, remainder: Remainder) -> Summary:
        """One pass over k and v `[G, nk, T, D]`; real bool `[G, nk, T]`, None when no slot is padding."""
        weight = None if real is None else real.to(k.dtype)
        tokens = k.new_full(k.shape[:2], k.shape[2]) if weight is None else weight.sum(-1)
        mean_k, mean_v = (x.sum(2) / tokens.clamp(min=1).unsqueeze(-1) for x in (k, v))
        out = cls(k, v, weight, mean_k, mean_v, tokens, None)
        if remainder.mass == "mean":
            return out
        variance = torch.empty_like(mean_k)
        for head in range(len(k)):
            spread = out.deviations(head, slice(None)).square_().sum(1)
            variance[head] = spread / tokens[head].clamp(min=1).unsqueeze(-1)
        return cls(k, v, weight, mean_k, mean_v, tokens, variance)

    def deviations(self, head: int, blocks: slice) -> Tensor:
        """Keys minus the mean of their block `[n, T, D]`, zero at padding, for n of the blocks of a head."""
        delta = self.k[head, blocks] - self.mean_k[head, blocks].unsqueeze(1)
        return delta if self.real is None else delta.mul_(self.real[head, blocks].unsqueeze(-1))

    def seen_by(self, head: int, centres: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """What each of the queries `centres` `[U, D]` gets from each block: log-mass `[U, nk]`, value `[U, nk, D]`."""
        # One product over the keys of all blocks is faster than one per block.
        logits = torch.mm(scale * centres, self.k[head].flatten(0, 1).T).view(len(centres), *self.k.shape[1:3])
        if self.real is not None:
            logits.masked_fill_(self.real[head] == 0, -torch.inf)
        weights, mass = _softmax(logits)
        return mass, torch.bmm(weights.transpose(0, 1), self.v[head]).transpose(0, 1)

    def covariances(self, head: int, first: int, last: int, group: int) -> tuple[Tensor, Tensor]:
        """H summed over groups of `group` blocks, `[g, D, D]`, and their tokens `[g]`, for blocks first to last."""
        dim = self.k.shape[-1]
        if group == 1:
            inside = slice(first, last)
            # Σ (k - m) vᵀ = Σ k vᵀ - m Σ vᵀ: one pass less over the keys; padding is zero in both.
            sums = (self.mean_v[head, inside] * self.tokens[head, inside].unsqueeze(-1)).unsqueeze(1)
            each = torch.bmm(self.k[head, inside].transpose(1, 2), self.v[head, inside])
            return each.baddbmm_(self.mean_k[head, inside].unsqueeze(2), sums, alpha=-1), self.tokens[head, inside]
        h, tokens = [], []
        for start in range(first, last, group):
            inside = slice(start, min(start + group, last))
            h.append(self.deviations(head, inside).view(-1, dim).T @ self.v[head, inside].reshape(-1, dim))
            tokens.append(self.tokens[head, inside].sum())
        return torch.stack(h), torch.stack(tokens)


@dataclass(frozen=True)
class _Head:
    """One head: query blocks `[nq, T, D]`, what they selected `[nq, nk]`, and their mean queries `[nq, D]` or None."""

    index: int
    q: Tensor
    selected: Tensor
    centres: Tensor | None
    summary: Summary
    scale: float

    def moved(self, rows: slice) -> Tensor:
        """Queries of some query blocks relative to the point of expansion, `[U, T, D]`."""
        return self.q[rows] if self.centres is None else self.q[rows] - self.centres[rows].unsqueeze(1)

    def logits(self, rows: slice, blocks: slice, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the n summary keys `blocks`, -inf where selected or empty, and their values.

        Args:
            rows: U of the query blocks.
            blocks: n of the key blocks.
            beside: `[U, T]`, a further column of logits.

        Returns:
            Logits `[U, T, n]`, or `[U, T, n + 1]` with `beside`; values `[n, D]`, or one set per row `[U, n, D]`.
        """
        summary, mean_k = self.summary, self.summary.mean_k[self.index, blocks]
        bias, values = self._mass(rows)
        bias, count = bias.masked_fill(self.selected[rows], -torch.inf)[:, blocks], len(mean_k)
        out = bias.new_empty(*bias.shape[:1], self.q.shape[1], count + (beside is not None))
        # A small bias where the product is written, rather than a mask of the logits: passes less over them.
        out[..., :count] = bias.unsqueeze(1)
        if beside is not None:
            out[..., count] = beside
        queries, flat = self.q[rows].flatten(0, 1), out.flatten(0, 1)[:, :count]
        flat.addmm_(queries, mean_k.T, alpha=self.scale)
        if summary.variance is not None:
            second = torch.mm((self.scale * queries).square_(), 0.5 * summary.variance[self.index, blocks].T)
            flat += second.minimum(summary.tokens[self.index, blocks].log())
        return out, values[..., blocks, :]

    def _mass(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Log-mass of every block for a query at the origin `[U, nk]`, and values `[nk, D]` or `[U, nk, D]`."""
        summary, index = self.summary, self.index
        if self.centres is None:
            return summary.tokens[index].log().expand(len(self.q[rows]), -1), summary.mean_v[index]
        mass, values = summary.seen_by(index, self.centres[rows], self.scale)
        # scale * (q - c)·m is taken apart, so that c stays out of the pass over the queries.
        return mass.addmm(self.centres[rows], summary.mean_k[index].T, alpha=-self.scale), values


def add_remainder(
    q: Tensor,
    out: Tensor,
    lse: Tensor,
    selected: Tensor,
    summary: Summary,
    remainder: Remainder,
    scale: float,
    lengths: Tensor,
) -> None:
    """Let the unselected blocks join the exact part, in place.

    Args:
        q: query blocks `[G, nq, T, D]`, padding zero.
        out, lse: output `[G, nq, T, D]` and log-sum-exp `[G, nq, T]` of the exact part; 0 and -inf without keys.
        selected: bool `[G, nq, nk]`.
        summary: statistics of the key blocks.
        remainder: what to add.
        scale: factor on q·k.
        lengths: how many tokens of each query block are queries, `[nq]`.
    """
    count, size = summary.tokens.shape[1], q.shape[2]
    group = remainder.blocks_per_group(count)
    real = (torch.arange(size, device=q.device) < lengths.unsqueeze(-1)).to(q.dtype).unsqueeze(-1)
    for index in range(len(q)):
        centres = None if remainder.about == "key" else q[index].sum(1) / lengths.unsqueeze(-1)
        head = _Head(index, q[index], selected[index], centres, summary, scale)
        # Weights of the groups, kept where they are few: per query, or per query block.
        is_mixed = remainder.first_order == "mixed"
        shape = (q.shape[1], 1 if is_mixed else size, -(-count // group) if group else 0)
        shares = q.new_empty(shape) if remainder.first_order not in ("none", "block") else None
        widest = max(size, q.shape[3]) if centres is not None else size
        for rows in _chunks(q.shape[1], widest * count):
            weights = _join(head, rows, out[index, rows], lse[index, rows])
            if shares is not None:
                shares[rows] = _shares(weights, group, real[rows] / lengths[rows, None, None] if is_mixed else None)
        if is_mixed and shares is not None:
            _add_mixed_first_order(head, out[index], shares.squeeze(1))
        elif group:
            _add_first_order(head, out[index], lse[index], group, shares)


def _chunks(total: int, numbers: int) -> list[slice]:
    """Cut `total` rows of `numbers` numbers each so that no part exceeds the largest temporary."""
    step = max(1, _CHUNK_NUMBERS // numbers)
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) in place; zero where lse is -inf, which leaves no key to weigh."""
    return logits.sub_(lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp_()


def _shares(weights: Tensor, group: int, pool: Tensor | None) -> Tensor:
    """Weights `[U, T, n]` summed over groups of blocks `[U, T, g]`, or averaged by `pool` `[U, T, 1]`: `[U, 1, n]`."""
    if pool is not None:
        return torch.bmm(pool.transpose(1, 2), weights)
    if group >= weights.shape[-1]:
        return weights.sum(-1, keepdim=True)
    index = torch.arange(weights.shape[-1], device=weights.device) // group
    return weights.new_zeros(*weights.shape[:2], int(index[-1]) + 1).index_add_(-1, index, weights)


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of logits `[..., L]`, which it overwrites, and their log-sum-exp `[...]`; of nothing but -inf 0, -inf."""
    largest = logits.amax(-1)
    weights = torch.softmax(logits, -1, out=logits)
    # The largest weight is exp(largest - lse), which costs a maximum instead of exponentials of its own.
    lse = largest - weights.amax(-1).log()
    empty = largest.isneginf()
    if bool(empty.any()):
        weights.masked_fill_(empty.unsqueeze(-1), 0)
        lse.masked_fill_(empty, -torch.inf)
    return weights, lse


def _join(head: _Head, rows: slice, out: Tensor, lse: Tensor) -> Tensor:
    """Summary keys into one softmax with the exact part of query blocks `[U, T, D]`, in place; their weights."""
    # The exact part is one more column: a softmax is cheaper than a log-sum-exp and an exponential.
    logits, values = head.logits(rows, slice(None), beside=lse)
    weights, joint = _softmax(logits)
    out.mul_(weights[..., -1:])
    weights = weights[..., :-1]
    if values.ndim == 3:
        out.baddbmm_(weights, values)
    else:
        out.flatten(0, 1).addmm_(weights.flatten(0, 1), values)
    lse.copy_(joint)
    return weights


def _add_first_order(head: _Head, out: Tensor, lse: Tensor, group: int, shares: Tensor | None) -> None:
    """Σ_g (p_g / t_g) * scale * x·H_g into the output of one head `[nq, T, D]`, in place; lse is that of the union.

    `shares` `[nq, T, g]` are the p_g; None: they are made again, chunk by chunk.
    """
    count, (_, size, dim) = head.summary.tokens.shape[1], head.q.shape
    for groups in _chunks(-(-count // group), dim * dim):
        first, last = groups.start * group, min(groups.stop * group, count)
        h, tokens = head.summary.covariances(head.index, first, last, group)
        for rows in _chunks(len(out), size * max(last - first, len(h) * dim)):
            if shares is None:
                mass = _shares(_weights(head.logits(rows, slice(first, last))[0], lse[rows]), group, None)
            else:
                mass = shares[rows, :, groups]
            mass = mass * (head.scale / tokens.clamp(min=1))
            lifted = mass.unsqueeze(-1) * head.moved(rows).unsqueeze(-2)
            out[rows].add_(torch.matmul(lifted.flatten(-2), h.flatten(0, 1)))


def _add_mixed_first_order(head: _Head, out: Tensor, shares: Tensor) -> None:
    """Σ_j (p_j / t_j) * scale * x·H_j into the output of one head `[nq, T, D]`, with shares `[nq, nk]`, in place."""
    dim = out.shape[-1]
    for blocks in _chunks(shares.shape[1], dim * dim):
        h, tokens = head.summary.covariances(head.index, blocks.start, blocks.stop, 1)
        mass = shares[:, blocks] * (head.scale / tokens.clamp(min=1))
        for rows in _chunks(len(out), dim * max(dim, out.shape[1])):
            mixed = torch.matmul(mass[rows], h.flatten(1)).view(-1, dim, dim)
            out[rows].baddbmm_(head.moved(rows), mixed)
