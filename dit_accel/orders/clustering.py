"""K-means over tokens, per batch item and head, in chunks, from given centroids.

Axis legend: B batch, H heads, N tokens, D head size, C clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_ELEMENTS = 2**24


@dataclass(frozen=True)
class Clusters:
    """A partition of tokens.

    Args:
        labels: int64 `[B, H, N]`, the cluster of each token.
        centroids: `[B, H, C, D]`, the mean of each cluster; a cluster without tokens keeps the one it had.
        sizes: `[B, H, C]`, tokens per cluster.
        iterations: how many were run.
    """

    labels: Tensor
    centroids: Tensor
    sizes: Tensor
    iterations: int


def drawn_centroids(x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` different tokens of each head as first centroids, `[B, H, C, D]`; the same places in all batch items.

    Args:
        x: `[B, H, N, D]`.
        count: at most N.
        generator: on the device of `x`.
    """
    place = torch.rand(x.shape[1], x.shape[2], generator=generator, device=x.device).argsort(-1)[:, :count]
    index = place.expand(x.shape[0], -1, -1).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, index)


def k_means(x: Tensor, centroids: Tensor, iterations: int, tolerance: float = 0.0) -> Clusters:
    """Lloyd's algorithm with Euclidean distance, deterministic on every device.

    Each iteration assigns every token to the nearest centroid (of several the first) and moves centroids to the means
    of their tokens. Labels are those of the last assignment, so that centroids are the means of the clusters returned.

    Args:
        x: tokens, fp32 or fp64 `[B, H, N, D]`.
        centroids: where to begin, `[B, H, C, D]`.
        iterations: at most this many. 0: assign only, centroids stay.
        tolerance: stop when no centroid moves farther than this (to read that waits for the device). Default 0: never.
    """
    labels, sizes = _assign(x, centroids), None
    for done in range(1, iterations + 1):
        means, sizes = _means(x, labels, centroids.shape[2])
        moved = torch.where(sizes.unsqueeze(-1) > 0, means, centroids)
        farthest = float((moved - centroids).norm(dim=-1).max()) if tolerance > 0 else torch.inf
        centroids = moved
        if done == iterations or farthest <= tolerance:
            return Clusters(labels, centroids, sizes, done)
        labels = _assign(x, centroids)
    return Clusters(labels, centroids, _means(x, labels, centroids.shape[2])[1], 0)


def _chunk(heads: int, clusters: int) -> int:
    return max(1, _ELEMENTS // (heads * clusters))


def _assign(x: Tensor, centroids: Tensor) -> Tensor:
    """Nearest centroid of each token, int64 `[B, H, N]`."""
    lead, x, columns = x.shape[:3], x.flatten(0, 1), centroids.flatten(0, 1).transpose(1, 2)
    half_square = columns.square().sum(1, keepdim=True) / -2
    step = _chunk(len(x), columns.shape[2])
    parts = [torch.baddbmm(half_square, part, columns).argmax(-1) for part in x.split(step, 1)]
    return torch.cat(parts, 1).view(lead)


def _means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Mean `[B, H, C, D]` and number `[B, H, C]` of the tokens of each cluster; 0 without tokens."""
    if x.device.type != "cpu":
        return _one_hot_means(x, labels, clusters)
    batch, heads, _, dim = x.shape
    sums, sizes = x.new_zeros(batch * heads * clusters, dim), x.new_zeros(batch, heads, clusters)
    row = torch.arange(batch * heads).unsqueeze(-1) * clusters + labels.flatten(0, 1)
    sums.index_add_(0, row.flatten(), x.reshape(-1, dim))
    sizes.scatter_add_(-1, labels, torch.ones((), dtype=x.dtype).expand(labels.shape))
    return sums.view(batch, heads, clusters, dim) / sizes.clamp(min=1).unsqueeze(-1), sizes


def _one_hot_means(x: Tensor, labels: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """As `_means`, by products with one-hot rows: scattered sums add up in another order at every run on a GPU."""
    sums, sizes = x.new_zeros(*x.shape[:2], clusters, x.shape[3]), x.new_zeros(*x.shape[:2], clusters)
    number, step = torch.arange(clusters, device=x.device), _chunk(x.shape[0] * x.shape[1], clusters)
    for part, label in zip(x.split(step, 2), labels.split(step, 2), strict=True):
        member = (label.unsqueeze(-2) == number.unsqueeze(-1)).to(x.dtype)
        sums += member @ part
        sizes += member.sum(-1)
    return sums / sizes.clamp(min=1).unsqueeze(-1), sizes


def chain_order(centroids: Tensor) -> Tensor:
    """An order in which neighbours are alike: from the centroid farthest from the mean always to the nearest one left.

    Tokens sorted by cluster are cut into blocks of a fixed size, and a block that holds parts of two clusters is good
    for both only when they are alike.

    Args:
        centroids: `[B, H, C, D]`.

    Returns:
        int64 `[B, H, C]`: the number of the centroid at each place.
    """
    square = centroids.square().sum(-1)
    distance = square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * centroids @ centroids.transpose(-1, -2)
    current = (centroids - centroids.mean(2, keepdim=True)).square().sum(-1).argmax(-1, keepdim=True)
    left, places = torch.zeros_like(square), []
    for _ in range(centroids.shape[2]):
        places.append(current)
        left.scatter_(-1, current, torch.inf)
        row = distance.gather(2, current.unsqueeze(-1).expand(-1, -1, 1, distance.shape[-1])).squeeze(2)
        current = (row + left).argmin(-1, keepdim=True)
    return torch.cat(places, -1)


def chain_places(x: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Where tokens lie between the clusters before and after their own, up to a constant per cluster, `[B, H, N]`.

    It is the product with the way from the centroid before to the one after: tokens of a cluster sorted by it are a
    smooth continuation of both neighbours.

    Args:
        x: tokens `[B, H, N, D]`.
        labels: int64 `[B, H, N]`, below C.
        centroids: `[B, H, C, D]`, in an order in which neighbours are alike.
    """
    ways = torch.cat([centroids[:, :, 1:], centroids[:, :, -1:]], 2)
    ways = ways - torch.cat([centroids[:, :, :1], centroids[:, :, :-1]], 2)
    columns, step = ways.flatten(0, 1).transpose(1, 2), _chunk(x.shape[0] * x.shape[1], centroids.shape[2])
    parts = zip(x.flatten(0, 1).split(step, 1), labels.flatten(0, 1).unsqueeze(-1).split(step, 1), strict=True)
    return torch.cat([torch.bmm(part, columns).gather(-1, label) for part, label in parts], 1).view(labels.shape)
