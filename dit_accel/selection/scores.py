"""Scores of key blocks that look at all tokens: exact mass, antidiagonals, sub-blocks.

All return log-masses in fp32 (fp64 for fp64), up to a constant per row: their softmax over the key blocks of a row is
the share of the attention mass that the scorer expects. -inf marks key blocks without real tokens. Work is cut into
groups of query blocks, so that memory stays near `_ELEMENTS` whatever the length. A choice has no gradient.
Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.kernels.block_scores import Slots, max_slots, score_blocks
from dit_accel.kernels.block_statistics import block_means_in_triton
from dit_accel.kernels.operations import uses_triton
from dit_accel.kernels.products import KeyMatrix
from dit_accel.kernels.statistics_pass import tokens_of
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import Padding, gather_blocks, lengths_of, real_tokens, working
from dit_accel.transfer import to_device

# What is made at a time: on a CPU 1 MB of fp32, which stays in the cache of a core while several passes go over it.
# A GPU needs more at once to be busy.
_ELEMENTS = 2**18
_TIMES_ON_GPU = 256
# How much more where products of long rows are what costs: few large ones are faster than many small.
_LONG_PRODUCT = 8


def row_groups(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut `rows` rows of `width` numbers into groups that suit the device, at least one row each."""
    elements = _ELEMENTS * (1 if device.type == "cpu" else _TIMES_ON_GPU)
    step = max(1, elements // max(1, width))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def slots_first(x: Tensor) -> Tensor:
    """Keys `[B, H, n, S, D]` of n blocks as the rows of one matrix, `[B, H, S * n, D]`.

    Blocks stand side by side in each slot, so that what is taken over the slots is taken over rows, which is fast.
    """
    return x.transpose(2, 3).flatten(2, 3)


def log_mass(mass: Tensor, real: Tensor) -> Tensor:
    """ln of a mass `[B, H, nq, nk]` that may be 0; -inf only where `real` (broadcasts against it) is False."""
    return mass.clamp(min=torch.finfo(mass.dtype).tiny).log().masked_fill(~real, -torch.inf)


def block_sums(x: Tensor, blocks: Blocking) -> Tensor:
    """Sums over the blocks of the last axis: `[..., N]` becomes `[..., n]`."""
    if blocks.is_uniform:
        return F.pad(x, (0, -x.shape[-1] % blocks.size)).unflatten(-1, (blocks.count, blocks.size)).sum(-1)
    starts, lengths = blocks.on(x.device)
    place = torch.arange(blocks.size, device=x.device)
    token = torch.where(place < lengths.unsqueeze(-1), starts.unsqueeze(-1) + place, x.shape[-1])
    return F.pad(x, (0, 1)).index_select(-1, token.flatten()).unflatten(-1, token.shape).sum(-1)


def block_mass(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, lse: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The exact attention mass of every pair of blocks: the oracle of all scores, and the search of arXiv 2502.21079.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry; padded keys get no mass, padded queries give none.
        lse: log-sum-exp of every query row, `[B, H, N]`, by which rows are weighted in place of their own: with that
            of an earlier step the rows of tokens are off by a factor each. Default None: their own.

    Returns:
        Mass, sum of softmax weights over the rows and columns of a pair `[B, H, nq, nk]` (a row sums to the number of
        its real queries), and the log-sum-exp `[B, H, N]` it was made with.
    """
    if pools_in_triton(q, q.dtype, max(q_blocks.size, k_blocks.size)):
        return _mass_in_triton(q, k, q_blocks, k_blocks, layout, lse)
    real: Tensor | None = None
    if layout.is_padded:
        real = real_tokens(k.shape[2], layout.valid, k.device).expand(len(q), -1).repeat_interleave(q.shape[1], 0)
    queries, keys = (x.detach().flatten(0, 1) for x in (working(q) * q.shape[-1] ** -0.5, working(k)))
    own = queries.new_empty(queries.shape[:2])
    mass = queries.new_empty(len(queries), q_blocks.count, k_blocks.count)
    width = q_blocks.size * keys.shape[1]
    for head in row_groups(len(queries), width, q.device):
        matrix, padded = KeyMatrix(keys[head]), None if real is None else ~real[head].unsqueeze(1)
        for group in row_groups(q_blocks.count, width * (head.stop - head.start), q.device):
            inside = slice(int(q_blocks.starts[group.start]), int(q_blocks.starts[group.stop]))
            weights, own[head, inside] = _softmax_of(matrix.times(queries[head, inside]), padded)
            weights = block_sums(weights, k_blocks)
            if lse is not None:
                # A stale log-sum-exp may be far off; beyond this bound exp would overflow.
                stale = own[head, inside] - lse.flatten(0, 1)[head, inside]
                weights *= stale.clamp(max=60).exp().unsqueeze(-1)
            if real is not None:
                weights.masked_fill_(~real[head, inside].unsqueeze(-1), 0)
            rows = Blocking.from_lengths(q_blocks.lengths[group], q_blocks.size)
            mass[head, group] = block_sums(weights.transpose(-1, -2), rows).transpose(-1, -2)
    return mass.unflatten(0, q.shape[:2]), own.unflatten(0, q.shape[:2]) if lse is None else lse


def _mass_in_triton(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, lse: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same, with every token in a slot of its own."""
    queries, keys = runs(q, q_blocks, layout, 1), runs(k, k_blocks, layout, 1)
    at, slots = queries.at[0, 0], queries.at.shape[2:]
    norms = torch.empty(*q.shape[:2], *slots, dtype=torch.float32, device=q.device)
    if lse is not None:
        norms = lse.index_select(2, at.flatten().clamp(max=q.shape[2] - 1)).view_as(norms).float()
    mass = score_blocks(queries, keys, relative=True, norms=norms, given=lse is not None).exp()
    if lse is None:
        block = q_blocks.block_of_token()
        place = block * slots[1] + torch.arange(q.shape[2]) - q_blocks.starts[block]
        lse = norms.flatten(2).index_select(2, to_device(place, q.device))
    return mass, lse


def _softmax_of(logits: Tensor, padded: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of `logits` `[G, R, N]`, which it overwrites, and their log-sum-exp `[G, R]`; `padded` keys get none."""
    if padded is not None:
        logits.masked_fill_(padded, -torch.inf)
    largest = logits.amax(-1)
    weights = torch.softmax(logits, -1, out=logits)
    # The largest weight is exp(largest - lse); two maxima and a softmax cost less than an exponential of one's own.
    return weights, largest - weights.amax(-1).log()


def antidiagonal_scores(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    stride: int,
    padding: Padding = "real",
) -> Tensor:
    """Log-mass by antidiagonals: of every stride x stride tile of QKᵀ only one is summed (arXiv 2503.16428).

    Groups of `stride` tokens, last query with first key, give one logit: the mean of the products on the antidiagonal.
    A softmax over all key groups and a sum over the groups of a pair of blocks give its score. Where a block ends
    within a group, the missing tokens stand at the mean of the group, and it counts by its share of real tokens: so
    the score does not depend on how the length is padded, and a constant added to all keys changes nothing. With an
    even stride the antidiagonals meet every stripe, but only those diagonals whose offset is odd.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        stride: tokens per group; 1 gives the exact mass.
        padding: what stands in the slots of a short block, see `Padding`.

    Returns:
        `[B, H, nq, nk]`.
    """
    if padding == "real" and pools_in_triton(q, q.dtype, -(-max(q_blocks.size, k_blocks.size) // stride)):
        sides = [runs(x, blocks, layout, stride) for x, blocks in ((q, q_blocks), (k, k_blocks))]
        has_partial = any(_has_partial(blocks, layout, stride) for blocks in (q_blocks, k_blocks))
        return score_blocks(*sides, stride=stride, relative=True, has_partial=has_partial)
    queries, seen = _grouped(q, q_blocks, layout, stride, padding)
    keys, counts = _grouped(k, k_blocks, layout, stride, padding)
    # Keys are copied anyway: turning them round and scaling them leaves the queries as they are.
    queries, columns = queries.flatten(-2), keys.flip(-2).mul_(q.shape[-1] ** -0.5 / stride).flatten(-2).flatten(2, 3)
    bias = None if _are_whole(k_blocks, layout, stride) else (counts / stride).log().flatten(1)[:, None, None]
    matrix = KeyMatrix(columns, bias)
    scores = []
    width = q.shape[0] * q.shape[1] * queries.shape[3] * columns.shape[2]
    for part in row_groups(q_blocks.count, width // _LONG_PRODUCT, q.device):
        logits = matrix.times(queries[:, :, part].flatten(2, 3))
        shares = torch.softmax(logits, -1, out=logits).unflatten(2, (-1, queries.shape[3]))
        # Over queries first: those sums run along rows, and leave little for the sums over the groups of keys.
        rows = (seen[:, None, part, None] / stride @ shares).squeeze(3)
        scores.append(rows.unflatten(-1, (k_blocks.count, -1)).sum(-1))
    return log_mass(torch.cat(scores, 2), (counts.sum(-1) > 0)[:, None, None])


def pools_in_triton(x: Tensor, dtype: torch.dtype, slots: int) -> bool:
    """Whether a Triton kernel pools scores of tensors where x is, of this dtype and with so many slots to a block."""
    return slots <= max_slots(dtype) and uses_triton("block scores", x, dtype)


def runs(x: Tensor, blocks: Blocking, layout: TokenLayout, size: int) -> Slots:
    """Runs of `size` tokens of every block of x `[B, H, N, D]`, each weighing its share of real tokens."""
    first = torch.arange(0, blocks.size, size, dtype=torch.int32, device=x.device)
    left = tokens_of(blocks, lengths_of(layout.valid, x.device), x.device)[:, None, :, None]
    count = (left - first).clamp(0, size)
    at = (blocks.on(x.device)[0].unsqueeze(-1) + first).expand_as(count)
    return Slots(x, at, count, count / size)


def _has_partial(blocks: Blocking, layout: TokenLayout, size: int) -> bool:
    """Whether some run of `size` tokens of a block has real tokens and lacks others; the device is not asked."""
    lengths = blocks.lengths
    if layout.valid is not None:
        lengths = (torch.tensor(layout.valid).unsqueeze(-1) - blocks.starts[:-1]).clamp(min=0).minimum(lengths)
    return bool((lengths % size).any())


def _grouped(x: Tensor, blocks: Blocking, layout: TokenLayout, size: int, padding: Padding) -> tuple[Tensor, Tensor]:
    """Groups of `size` consecutive tokens of every block, and how many are real.

    Returns `[B, H, n, G, size, D]`, missing tokens at the mean of their group, and counts `[B or 1, n, G]`.
    """
    rows, real = gather_blocks(x, blocks, layout.valid, padding)
    if _are_whole(blocks, layout, size):
        whole = rows.unflatten(3, (-1, size))
        return whole, rows.new_full((1, *whole.shape[2:4]), size)
    rows = F.pad(rows, (0, 0, 0, -blocks.size % size)).unflatten(3, (-1, size))
    real = F.pad(real, (0, -blocks.size % size)).unflatten(-1, (-1, size))
    counts = real.sum(-1).to(rows.dtype)
    means = rows.sum(4, keepdim=True) / counts.clamp(min=1)[:, None, :, :, None, None]
    return torch.where(real[:, None, ..., None], rows, means), counts


def _are_whole(blocks: Blocking, layout: TokenLayout, size: int) -> bool:
    """Whether every group of `size` tokens of every block is full of real tokens."""
    return layout.valid is None and blocks.tokens == blocks.count * blocks.size and blocks.size % size == 0


def subblock_scores(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    q_parts: int,
    k_parts: int,
    padding: Padding = "real",
) -> Tensor:
    """Log-sum-exp over the pairs of sub-blocks of a pair of blocks, each pooled to its mean.

    The score is ln Σ_ab m_a n_b exp(q̄_a·k̄_b / sqrt(D)) with m_a queries and n_b keys in the sub-blocks; with equal
    sub-blocks the counts are a constant. One part each is the pooled score. Source: "SubBlock" of SGLang.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        q_parts, k_parts: into how many runs of equal length each block is cut.
        padding: what stands in the slots of a short block, see `Padding`.

    Returns:
        `[B, H, nq, nk]`.
    """
    in_triton = padding == "real" and uses_triton("block means", q)
    if in_triton and pools_in_triton(q, torch.float32, max(q_parts, k_parts)):
        return score_blocks(_parts(q, q_blocks, layout, q_parts, True), _parts(k, k_blocks, layout, k_parts, False))
    queries, seen = _part_means(q, q_blocks, layout, q_parts, padding)
    keys, counts = _part_means(k, k_blocks, layout, k_parts, padding)
    queries, keys, parts = queries * q.shape[-1] ** -0.5, keys.flatten(2, 3), queries.shape[3]
    matrix, scores = KeyMatrix(keys, counts.log().flatten(1)[:, None, None]), []
    # Where a query block holds padding alone, its row is not used but must not become NaN.
    weight = torch.where(seen.sum(-1, keepdim=True) > 0, seen, 1.0).log()[:, None, :, :, None]
    for group in row_groups(q_blocks.count, q.shape[0] * q.shape[1] * parts * keys.shape[2], q.device):
        logits = matrix.times(queries[:, :, group].flatten(2, 3))
        logits = logits.unflatten(-1, (k_blocks.count, -1)).logsumexp(-1).unflatten(2, (-1, parts))
        scores.append((logits + weight[:, :, group]).logsumexp(3))
    return torch.cat(scores, 2)


def _part_means(
    x: Tensor, blocks: Blocking, layout: TokenLayout, parts: int, padding: Padding
) -> tuple[Tensor, Tensor]:
    """Means `[B, H, n, P, D]` and counts `[B or 1, n, P]` of the runs into which every block is cut."""
    size = -(-blocks.size // parts)
    rows, real = gather_blocks(x, blocks, layout.valid, padding)
    sums = F.pad(rows, (0, 0, 0, -blocks.size % size)).unflatten(3, (-1, size)).sum(4)
    counts = F.pad(real, (0, -blocks.size % size)).unflatten(-1, (-1, size)).sum(-1).to(sums.dtype)
    return sums / counts.clamp(min=1)[:, None, ..., None], counts


def _parts(x: Tensor, blocks: Blocking, layout: TokenLayout, parts: int, are_queries: bool) -> Slots:
    """The same as slots: one mean each, weighing its tokens; queries of a block without any weigh 1 each."""
    lengths = lengths_of(layout.valid, x.device)
    means = block_means_in_triton(x, blocks, lengths, parts)
    size = -(-blocks.size // parts)
    first = torch.arange(0, blocks.size, size, dtype=torch.int32, device=x.device)
    weight = (tokens_of(blocks, lengths, x.device)[:, None, :, None] - first).clamp(0, size).float()
    if are_queries:
        weight = torch.where(weight.sum(-1, keepdim=True) > 0, weight, 1.0)
    at = torch.arange(means.shape[2], dtype=torch.int32, device=x.device).view(1, 1, blocks.count, -1)
    at = at.expand_as(weight)
    return Slots(means, at, torch.ones_like(at), weight)
