"""Orders that look at queries and keys: they are made per head and per call. Text stays in place.

Keys of conditioning frames stay in place as well, at the front of the video: every query attends them, and scattered
over the blocks they would make every block one that is attended.

Axis legend: B batch, H heads, N tokens, D head size, V video tokens, C clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.order import TokenOrder, video_order
from dit_accel.orders.clustering import chain_order, chain_places, drawn_centroids, k_means
from dit_accel.plan import Blocking
from dit_accel.selection import block_means, generator_for, real_tokens
from dit_accel.selection.pooling import working

_NUMBERS = 1 << 22  # size of the largest temporary, in numbers


def hotness(q: Tensor, k: Tensor, blocks: Blocking) -> Tensor:
    """How much attention each key gets from the mean queries of all query blocks, `[B, H, N]`; rows sum to nq.

    Args:
        q, k: `[B, H, N, D]`, without text.
        blocks: partition of the queries.
    """
    means = block_means(q, blocks)[0] * q.shape[-1] ** -0.5
    keys, out = k.to(means.dtype).transpose(-1, -2), means.new_zeros(k.shape[:3])
    for part in means.split(max(1, _NUMBERS // (k.shape[0] * k.shape[1] * k.shape[2])), 2):
        out += (part @ keys).softmax(-1).sum(2)
    return out


def hot_key_order(
    q: Tensor, k: Tensor, layout: TokenLayout, block: int, segment: int | None, share: float
) -> TokenOrder:
    """Keys sorted by `hotness`, the hottest first; queries stay in the raster (after arXiv 2510.21270).

    The published score looks at the last queries of a causal prompt; a video has no last queries, so the mean queries
    of all blocks vote.

    Args:
        q, k: `[B, H, N, D]` in the raster.
        layout: token geometry.
        block: query block in tokens.
        segment: sort within runs of this many tokens; a shorter last run stays as it is. None: all video tokens.
        share: only this share of the keys of a segment, the hottest, is moved to its front; the others keep their
            order, so that their blocks stay local. 1 sorts all.
    """
    first = first_sorted_key(layout)
    rest = layout.video - first
    heat = hotness(q[:, :, layout.video_slice()], _video_from(k, layout, first), Blocking.uniform(layout.video, block))
    size = rest if segment is None else segment
    whole = rest // size * size
    runs = heat[..., :whole].unflatten(-1, (-1, size))
    rank = runs.argsort(dim=-1, descending=True, stable=True)
    hot = round(share * size)
    if hot < size:
        front = torch.zeros_like(runs, dtype=torch.bool).scatter_(-1, rank[..., :hot], True)
        cold = (front.long() * size + torch.arange(size, device=k.device)).argsort(-1)[..., : size - hot]
        rank = torch.cat([rank[..., :hot], cold], -1)
    index = (rank + torch.arange(0, whole, size, device=k.device).unsqueeze(-1)).flatten(-2)
    tail = torch.arange(whole, rest, device=k.device).expand(*index.shape[:2], -1)
    raster = torch.arange(layout.tokens, device=k.device)
    return TokenOrder(raster, _whole(layout, torch.cat([index, tail], -1), first))


def lsh_order(q: Tensor, k: Tensor, layout: TokenLayout, projections: int, seed: int) -> TokenOrder:
    """Queries and keys, each sorted by the rank of their angular hash in the Gray code (arXiv 2310.05869).

    Args:
        q, k: `[B, H, N, D]` in the raster.
        layout: token geometry.
        projections: number of random directions, shared by queries and keys.
        seed: of the directions.
    """
    directions = torch.randn(
        q.shape[-1], projections, generator=generator_for(q.device, seed), device=q.device, dtype=torch.float32
    )
    orders = []
    for x, first in ((q, 0), (k, first_sorted_key(layout))):
        rank = gray_rank(_video_from(x, layout, first).float() @ directions > 0)
        orders.append(_whole(layout, rank.argsort(dim=-1, stable=True), first))
    return TokenOrder(*orders)


def gray_rank(bits: Tensor) -> Tensor:
    """Place of a code `bits` `[..., R]` in the Gray code, int64 `[...]`: neighbours in rank differ in one bit."""
    # Decoding: every bit is the parity of the bits above it and itself.
    binary = bits.long().cumsum(-1) % 2
    weights = 2 ** torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (binary * weights).sum(-1)


def kmeans_order(
    q: Tensor,
    k: Tensor,
    layout: TokenLayout,
    clusters: int,
    rounds: int,
    start: tuple[Tensor, Tensor] | None,
    generator: torch.Generator,
) -> tuple[TokenOrder, tuple[Tensor, Tensor]]:
    """Queries and keys, each sorted by cluster, neighbouring clusters next to each other (after arXiv 2505.18875).

    Blocks are cut from the sorted sequence at equal lengths, so that a block may hold the end of one cluster and the
    beginning of the next. Therefore the tokens of a cluster stand by how near they are to its neighbours, those nearer
    to the one before first (this project). Padding is in no cluster and stays last.

    Args:
        q, k: `[B, H, N, D]` in the raster.
        layout: token geometry.
        clusters: how many for the queries, and for the keys; fewer where there are fewer tokens.
        rounds: iterations of Lloyd's algorithm.
        start: centroids `[B, H, C, D]` of queries and keys to begin with, as an earlier call gave them; their clusters
            stand in the order of the centroids. None: drawn.
        generator: draws the first centroids.

    Returns:
        The order, and the centroids for a later call, alike ones next to each other.
    """
    found, orders = [], []
    for place, x in enumerate((q, k)):
        first = first_sorted_key(layout) if place else 0
        video, real = video_tokens(x, layout, first)
        count = min(clusters, video.shape[2])
        made = k_means(video, drawn_centroids(video, count, generator) if start is None else start[place], rounds)
        labels, centroids = made.labels, made.centroids
        if start is None:
            chain = chain_order(centroids)
            labels = chain.argsort(-1).gather(-1, labels)
            centroids = centroids.gather(2, chain.unsqueeze(-1).expand_as(centroids))
        places = chain_places(video, labels, centroids).argsort(dim=-1, stable=True)
        if real is not None:
            labels = labels.masked_fill(~real, count)
        index = places.gather(-1, labels.gather(-1, places).argsort(dim=-1, stable=True))
        orders.append(_whole(layout, index, first))
        found.append(centroids)
    return TokenOrder(*orders), (found[0], found[1])


def video_tokens(x: Tensor, layout: TokenLayout, first: int = 0) -> tuple[Tensor, Tensor | None]:
    """The video tokens of x `[B, H, N, D]`, from `first` on, in the arithmetic of scores, and which are real.

    The former are `[B, H, V, D]`, the latter bool `[B, 1, V]`, None where all are; padding is replaced by the first of
    them, whatever it held.
    """
    video = working(_video_from(x, layout, first))
    if not layout.is_padded:
        return video, None
    real = _video_from(real_tokens(layout.tokens, layout.valid, x.device).unsqueeze(1), layout, first)
    return torch.where(real.unsqueeze(-1), video, video[:, :, :1]), real


def first_sorted_key(layout: TokenLayout) -> int:
    """The first video token among the keys that are put in order: that behind the conditioning frames.

    Where all frames are conditioning no block is left out, and all keys are put in order.
    """
    return layout.prefix % layout.video


def _video_from(x: Tensor, layout: TokenLayout, first: int) -> Tensor:
    """The video tokens of x `[B, H, N, ...]` from `first` on."""
    return x[:, :, layout.video_start + first : layout.video_slice().stop]


def _whole(layout: TokenLayout, index: Tensor, first: int = 0) -> Tensor:
    """The permutation `[B, H, N]` that sorts the video from token `first` on by `index` `[B, H, V - first]`."""
    front = torch.arange(first, device=index.device).expand(*index.shape[:-1], -1)
    return video_order(layout, torch.cat([front, index + first], -1)).query
