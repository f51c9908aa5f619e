"""Scores of key blocks from a part of the tokens: probed query blocks, every n-th token, random places.

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.kernels.block_scores import Slots, score_blocks
from dit_accel.kernels.products import KeyMatrix
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.pooling import Padding, gather_blocks, lengths_of, real_tokens, working
from dit_accel.selection.scores import block_sums, pools_in_triton, row_groups, runs, slots_first
from dit_accel.transfer import to_device


def probe_blocks(layout: TokenLayout, q_blocks: Blocking, probes: int) -> Tensor:
    """`probes` video blocks spread evenly over the sequence (all when there are fewer), int64 on the CPU."""
    video = (~layout.text_blocks(q_blocks)).nonzero().squeeze(-1)
    count = min(probes, len(video))
    return video[(2 * torch.arange(count) + 1) * len(video) // (2 * count)]


def probe_profiles(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    probes: int,
    rows: int | None = None,
) -> Tensor:
    """How the queries of a few blocks spread their attention over the key blocks, `[B, H, probes, nk]`.

    Rows sum to 1: the mean over the real queries of a block of their exact mass on each key block.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        probes: how many query blocks, see `probe_blocks`.
        rows: how many queries of a block are looked at, spread evenly over it. Default None: all.
    """
    many = min(rows or q_blocks.size, q_blocks.size)
    if pools_in_triton(q, q.dtype, max(many, k_blocks.size)):
        sides = _probed(q, q_blocks, layout, probes, many), runs(k, k_blocks, layout, 1)
        return score_blocks(*sides, relative=True).exp()
    k, real = working(k).transpose(-1, -2), real_tokens(layout.tokens, layout.valid, q.device)[:, None]
    profiles = []
    for block in probe_blocks(layout, q_blocks, probes).tolist():
        first, length = int(q_blocks.starts[block]), int(q_blocks.lengths[block])
        count = length if rows is None else min(rows, length)
        at = to_device(first + torch.arange(count) * length // count, q.device)
        logits = working(q[:, :, at]) * q.shape[-1] ** -0.5 @ k
        if layout.is_padded:
            logits.masked_fill_(~real.unsqueeze(-2), -torch.inf)
        seen = real[..., at].unsqueeze(-1)
        weights = block_sums(logits.softmax(-1), k_blocks).masked_fill(~seen, 0)
        profiles.append(weights.sum(2) / seen.sum(2).clamp(min=1))
    return torch.stack(profiles, 2)


def _probed(q: Tensor, blocks: Blocking, layout: TokenLayout, probes: int, rows: int) -> Slots:
    """Queries of the probed blocks of q `[B, H, N, D]`, at most `rows` of each, which share a weight of 1."""
    block = probe_blocks(layout, blocks, probes)
    length = blocks.lengths[block].unsqueeze(-1)
    count, number = length.clamp(max=rows), torch.arange(rows)
    at = blocks.starts[:-1][block].unsqueeze(-1) + (number * length // count).minimum(length - 1)
    at, inside = (to_device(x, q.device)[None, None] for x in (at.int(), number < count))
    valid = lengths_of(layout.valid, q.device)
    seen = inside if valid is None else inside & (at < valid.view(-1, 1, 1, 1))
    weight = seen / seen.sum(-1, keepdim=True).clamp(min=1)
    return Slots(q, at.expand_as(seen), seen.int(), weight)


def largest_weights(
    q: Tensor, k: Tensor, q_blocks: Blocking, k_blocks: Blocking, layout: TokenLayout, stride: int
) -> Tensor:
    """Largest attention weight in each pair of blocks, of every `stride`-th query and key (arXiv 2509.24745).

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions; counting begins anew in each block, and its first token is always looked at.
        layout: token geometry.
        stride: 1 looks at all tokens.

    Returns:
        Weights in [0, 1], `[B, H, nq, nk]`; 0 for padding.
    """
    if pools_in_triton(q, q.dtype, -(-max(q_blocks.size, k_blocks.size) // stride)):
        sides = [_every(x, blocks, layout, stride) for x, blocks in ((q, q_blocks), (k, k_blocks))]
        norms = torch.empty(*q.shape[:2], *sides[0].at.shape[2:], dtype=torch.float32, device=q.device)
        score_blocks(*sides, relative=True, norms=norms)
        return score_blocks(*sides, largest=True, relative=True, norms=norms, given=True).exp()
    (queries, seen), (keys, real) = (
        (rows[:, :, :, ::stride], inside[..., ::stride])
        for rows, inside in (gather_blocks(q, q_blocks, layout.valid), gather_blocks(k, k_blocks, layout.valid))
    )
    queries, keys = queries * q.shape[-1] ** -0.5, slots_first(keys)
    padded, matrix = ~real.transpose(1, 2).flatten(1)[:, None, None], KeyMatrix(keys)
    count, weights = queries.shape[3], []
    for group in row_groups(q_blocks.count, q.shape[0] * q.shape[1] * count * keys.shape[2], q.device):
        part = matrix.times(queries[:, :, group].flatten(2, 3)).masked_fill_(padded, -torch.inf).softmax(-1)
        part = part.unflatten(-1, (-1, k_blocks.count)).amax(-2).unflatten(2, (-1, count))
        weights.append(part.masked_fill(~seen[:, None, group, :, None], 0).amax(3))
    return torch.cat(weights, 2)


def _every(x: Tensor, blocks: Blocking, layout: TokenLayout, stride: int) -> Slots:
    """The first of every `stride` tokens of each block of x `[B, H, N, D]`."""
    slots = runs(x, blocks, layout, stride)
    count = slots.count.clamp(max=1)
    return Slots(x, slots.at, count, count.float())


def sampled_scores(
    q: Tensor,
    k: Tensor,
    q_blocks: Blocking,
    k_blocks: Blocking,
    layout: TokenLayout,
    samples: tuple[int, int],
    generator: torch.Generator,
    padding: Padding = "real",
) -> Tensor:
    """The largest logit of sampled tokens of a pair of blocks, relative to its row (arXiv 2508.10774, 2512.04025).

    For a sampled query a with largest sampled logit m_a the score of a key block is max_a (max_b s_ab - m_a), at most
    0 and 0 for the best block of some query. The same places are sampled in all blocks of a head, and in all items of
    the batch; in a short block they are spread over its real tokens, unless `padding` says that it is filled up.

    Args:
        q, k: `[B, H, N, D]`.
        q_blocks, k_blocks: partitions.
        layout: token geometry.
        samples: how many queries and keys of each block are looked at.
        generator: draws the places, on the device of q.
        padding: what stands in the slots of a short block, see `Padding`.

    Returns:
        `[B, H, nq, nk]`.
    """
    (q_at, q_empty, _), (k_at, k_empty, real) = (
        _places(q, blocks, layout, count, generator, padding)
        for blocks, count in ((q_blocks, samples[0]), (k_blocks, samples[1]))
    )
    if pools_in_triton(q, q.dtype, max(samples)):
        sides = [Slots(q, q_at.int(), (~q_empty).int(), torch.ones_like(q_at, dtype=torch.float32))]
        sides += [Slots(k, k_at.int(), (~k_empty).int(), real[:, None, :, None].expand_as(k_at).float())]
        return score_blocks(sides[0], sides[1], largest=True, relative=True)
    queries, keys = _taken(q, q_at, q_empty), _taken(k, k_at, k_empty)
    queries, keys = queries * q.shape[-1] ** -0.5, slots_first(keys)
    count, empty = queries.shape[3], ~real[:, None, None]
    matrix, scores = KeyMatrix(keys), []
    for group in row_groups(q_blocks.count, q.shape[0] * q.shape[1] * count * keys.shape[2], q.device):
        logits = matrix.times(queries[:, :, group].flatten(2, 3)).unflatten(-1, (-1, k_blocks.count)).amax(-2)
        logits = logits.masked_fill(empty, -torch.inf)
        logits = logits - logits.amax(-1, keepdim=True)
        scores.append(logits.unflatten(2, (-1, count)).amax(3))
    return torch.cat(scores, 2)


def _places(
    q: Tensor, blocks: Blocking, layout: TokenLayout, count: int, generator: torch.Generator, padding: Padding
) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled tokens int64 `[B or 1, H, n, count]`, bool like them, which are none, and `[B or 1, n]`, real blocks."""
    size, device = blocks.size, q.device
    draw = torch.rand(q.shape[1], size, generator=generator, device=device)
    place = draw.argsort(-1)[:, : min(count, size)].sort(-1).values
    starts, lengths = (part.long() for part in blocks.on(device))
    left, valid = lengths.unsqueeze(0), lengths_of(layout.valid, device)
    if valid is not None:
        left = (valid.unsqueeze(-1) - starts).clamp(min=0).minimum(lengths)
    place, left = place[None, :, None], left[:, None, :, None]
    if padding == "real":
        offset, empty = place * left // size, left == 0
    else:
        offset, empty = place.minimum(left - 1).clamp(min=0), (left if padding == "repeat" else left - place) <= 0
    token = starts[:, None] + offset
    return token, empty.expand_as(token), left[:, 0, :, 0] > 0


def _taken(x: Tensor, token: Tensor, empty: Tensor) -> Tensor:
    """Those tokens of x `[B, H, N, D]`, 0 where there is none, `[B, H, n, count, D]`."""
    token = token.expand(x.shape[0], -1, -1, -1)
    rows = x.gather(2, token.flatten(2).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1]))
    return working(rows).unflatten(2, token.shape[2:]).masked_fill(empty.unsqueeze(-1), 0)
