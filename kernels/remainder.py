"""The unselected blocks, as summary keys that join the softmax of the exact part through its log-sum-exp.

Nothing is ever larger than a chunk: neither the summary logits (N x nk) nor the covariances H (nk x D x D).
Axis legend: G = B * H heads, nq / nk query / key blocks, T tokens per block, U query tokens of a chunk.
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
        real: 1 for a real token and 0 for padding `[G, nk, T]`, in the dtype of k.
        mean_k, mean_v: `[G, nk, D]`.
        tokens: number of real tokens `[G, nk]`.
        variance: of the keys, per channel `[G, nk, D]`; None when the mass is not corrected.
    """

    k: Tensor
    v: Tensor
    real: Tensor
    mean_k: Tensor
    mean_v: Tensor
    tokens: Tensor
    variance: Tensor | None

    @classmethod
    def of(cls, k: Tensor, v: Tensor, real: Tensor | None, remainder: Remainder) -> Summary:
        """One pass over k and v `[G, nk, T, D]`; real bool `[G, nk, T]`, None when no slot is padding."""
        weight = k.new_ones(1, 1, k.shape[2]).expand(k.shape[:3]) if real is None else real.to(k.dtype)
        tokens = weight.sum(-1)
        mean_k, mean_v = (x.sum(2) / tokens.clamp(min=1).unsqueeze(-1) for x in (k, v))
        variance = None
        if remainder.mass == "diagonal":
            variance = torch.empty_like(mean_k)
            for head in range(len(k)):
                spread = (k[head] - mean_k[head].unsqueeze(1)).square_() * weight[head].unsqueeze(-1)
                variance[head] = spread.sum(1) / tokens[head].clamp(min=1).unsqueeze(-1)
        return cls(k, v, weight, mean_k, mean_v, tokens, variance)

    def logits(self, head: int, q: Tensor, selected: Tensor, scale: float, blocks: slice) -> Tensor:
        """Logits `[U, T, n]` of the summary keys `blocks`, -inf where selected or empty.

        Args:
            head: which of the G heads.
            q: query blocks `[U, T, D]` of that head.
            selected: bool `[U, nk]`, the blocks that were computed exactly.
            scale: factor on q·k.
            blocks: n of the nk key blocks.
        """
        mass = self.tokens[head, blocks].log()
        out = torch.matmul(q, self.mean_k[head, blocks].T).mul_(scale)
        if self.variance is not None:
            second = torch.matmul((scale * q).square_(), self.variance[head, blocks].T).mul_(0.5)
            out += second.minimum(mass)
        return out.add_(mass).masked_fill_(selected[:, None, blocks], -torch.inf)

    def covariances(self, head: int, first: int, last: int, group: int) -> tuple[Tensor, Tensor]:
        """H summed over groups of `group` blocks, `[g, D, D]`, and their tokens `[g]`, for blocks first to last."""
        dim = self.k.shape[-1]
        h, tokens = [], []
        for start in range(first, last, group):
            inside = slice(start, min(start + group, last))
            delta = (self.k[head, inside] - self.mean_k[head, inside].unsqueeze(1)) * self.real[head, inside, :, None]
            h.append(delta.view(-1, dim).T @ self.v[head, inside].reshape(-1, dim))
            tokens.append(self.tokens[head, inside].sum())
        return torch.stack(h), torch.stack(tokens)


def add_remainder(
    q: Tensor, out: Tensor, lse: Tensor, selected: Tensor, summary: Summary, remainder: Remainder, scale: float
) -> None:
    """Let the unselected blocks join the exact part, in place.

    Args:
        q: query blocks `[G, nq, T, D]`.
        out, lse: output `[G, nq, T, D]` and log-sum-exp `[G, nq, T]` of the exact part; 0 and -inf without keys.
        selected: bool `[G, nq, nk]`.
        summary: statistics of the key blocks.
        remainder: what to add.
        scale: factor on q·k.
    """
    count = summary.tokens.shape[1]
    group = remainder.blocks_per_group(count)
    for head in range(len(q)):
        for rows in _chunks(q.shape[1], q.shape[2] * count):
            part, chosen = q[head, rows], selected[head, rows]
            _join(part, out[head, rows], lse[head, rows], chosen, summary, scale, head)
        if group:
            _add_first_order(q[head], out[head], lse[head], selected[head], summary, scale, head, group)


def _chunks(total: int, numbers: int) -> list[slice]:
    """Cut `total` rows of `numbers` numbers each so that no part exceeds the largest temporary."""
    step = max(1, _CHUNK_NUMBERS // numbers)
    return [slice(first, min(first + step, total)) for first in range(0, total, step)]


def _weights(logits: Tensor, lse: Tensor) -> Tensor:
    """exp(logits - lse) in place; zero where lse is -inf, which leaves no key to weigh."""
    return logits.sub_(lse.masked_fill(lse.isneginf(), 0).unsqueeze(-1)).exp_()


def _join(q: Tensor, out: Tensor, lse: Tensor, selected: Tensor, summary: Summary, scale: float, head: int) -> None:
    """Summary keys into one softmax with the exact part of query blocks `[U, T, D]`, in place."""
    logits = summary.logits(head, q, selected, scale, slice(None))
    joint = torch.logaddexp(lse, logits.logsumexp(-1))
    out.mul_(_weights(lse.unsqueeze(-1).clone(), joint))
    out.add_(torch.matmul(_weights(logits, joint), summary.mean_v[head]))
    lse.copy_(joint)


def _add_first_order(
    q: Tensor, out: Tensor, lse: Tensor, selected: Tensor, summary: Summary, scale: float, head: int, group: int
) -> None:
    """Σ_g (p_g / t_g) * scale * q·H_g into the output of one head `[nq, T, D]`, in place; lse is that of the union."""
    count, (_, size, dim) = summary.tokens.shape[1], q.shape
    for groups in _chunks(-(-count // group), dim * dim):
        first, last = groups.start * group, min(groups.stop * group, count)
        h, tokens = summary.covariances(head, first, last, group)
        share = (torch.arange(last - first, device=q.device) // group).expand(size, -1)
        for rows in _chunks(len(q), size * max(last - first, len(h) * dim)):
            weights = _weights(summary.logits(head, q[rows], selected[rows], scale, slice(first, last)), lse[rows])
            mass = weights.new_zeros(*weights.shape[:2], len(h))
            mass.scatter_add_(-1, share.expand_as(weights), weights)
            mass.mul_(scale / tokens.clamp(min=1))
            lifted = mass.unsqueeze(-1) * q[rows].unsqueeze(-2)
            out[rows].add_(torch.matmul(lifted.flatten(-2), h.flatten(0, 1)))
