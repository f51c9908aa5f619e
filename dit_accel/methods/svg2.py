"""Sparse VideoGen 2: tokens sorted by k-means clusters, clusters chosen by the mass between their centroids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import BlockSize, Count, Size
from dit_accel.methods.dynamic import BlockSelection, Share
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder, video_order
from dit_accel.orders.clustering import chain_order, drawn_centroids, k_means
from dit_accel.orders.content import first_sorted_key, video_tokens
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import Budget, TopP, block_means, generator_for, plan_of_mask, real_tokens, select_blocks
from dit_accel.selection.scores import log_mass
from dit_accel.state import CallContext
from dit_accel.transfer import to_device

_TOLERANCE = 1e-4


@dataclass(frozen=True)
class _Side:
    """The groups of queries or of keys: clusters of video tokens, one empty group, and the blocks of text.

    Args:
        centroids: `[B, H, G, D]`, the mean of each group.
        labels: int64 `[B, H, N]`, the group of the token at each place of the ordered sequence.
        order: int64 `[B, H, N]`, the token at each place.
    """

    centroids: Tensor
    labels: Tensor
    order: Tensor


@register("svg2")
class SVG2(BlockSelection):
    """Queries and keys are clustered by content, per head; query clusters attend the key clusters with most mass.

    The kernel works on blocks of `block` tokens of the sorted sequence, which straddle clusters. Without a density the
    clusters are chosen by the published rule and the plan is the cover of the chosen pairs: what it computes beyond
    them stands in the report ("over_computation"). With a density, the mass of the clusters is spread over the blocks
    that hold them, and each block of queries takes the best blocks of keys.

    Clusters stand in an order in which neighbours are alike, so that straddling costs little. Centroids are carried
    over from step to step, per layer and guidance branch, and forgotten at the next generation.

    Args:
        density: share of key blocks that each query block attends. Default None: `mass` decides.
        mass: share of the mass that the chosen key clusters of a query cluster reach, the crossing one included.
        least: share of the key clusters that are chosen at least.
        query_clusters, key_clusters: at most these numbers, and at most one per 64 tokens.
        first_iterations: iterations of k-means where there are no centroids yet; published are 50. Later steps go on
            from there, so that fewer lose about 1 % of the recall.
        iterations: iterations at later steps; published are 2.
        block: block of queries and keys in tokens.
    """

    source: ClassVar[str] = "arXiv 2505.18875"

    mass: Share = 0.9
    least: Share = 0.1
    query_clusters: Size = 100
    key_clusters: Size = 500
    first_iterations: Count = 5
    iterations: Count = 1
    block: BlockSize = 64

    @property
    def orders_each_head(self) -> bool:
        """Yes."""
        return True

    @property
    def keeps_padding_last(self) -> bool:
        """Yes: padding is in no cluster."""
        return True

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Video tokens by cluster, queries and keys each by their own; text stays. q, k, v `[B, H, N, D]`."""
        sides = (
            self._side("queries", q, min(self.query_clusters, -(-call.layout.video // 64)), call),
            self._side("keys", k, min(self.key_clusters, -(-call.layout.video // 64)), call),
        )
        call.scratch["sides"] = sides
        return TokenOrder(sides[0].order, sides[1].order)

    def _side(self, name: str, x: Tensor, count: int, call: CallContext) -> _Side:
        layout = call.layout
        video, real = video_tokens(x, layout)
        centroids = call.memory.get(name)
        if centroids is None or centroids.shape[:3] != (*x.shape[:2], count):
            generator = generator_for(x.device, call.seed, call.layer, int(name == "keys"))
            centroids = k_means(video, drawn_centroids(video, count, generator), self.first_iterations, _TOLERANCE)
            places = chain_order(centroids.centroids).unsqueeze(-1).expand(-1, -1, -1, x.shape[-1])
            clusters = k_means(video, centroids.centroids.gather(2, places), 0)
        else:
            clusters = k_means(video, centroids, self.iterations)
        call.memory[name] = clusters.centroids
        # Padding is in no cluster and sorts last, so that it stands last in the sequence as well.
        labels = clusters.labels if real is None else clusters.labels.masked_fill(~real, count)
        # Every query attends the keys of conditioning frames: scattered, they would make every block one of theirs.
        first = first_sorted_key(layout) if name == "keys" else 0
        places = torch.arange(layout.video, device=x.device)
        index = labels.masked_fill(places < first, -1).argsort(dim=-1, stable=True)
        return _with_text(x, layout, self.block, clusters.centroids, labels.gather(-1, index), index)

    def blocks(self, layout: TokenLayout) -> tuple[Blocking, Blocking]:
        """Blocks of the sorted sequence."""
        blocks = layout.blocks(self.block)
        return blocks, blocks

    def key_order(self, call: CallContext) -> TokenOrder | None:
        """Keys by cluster."""
        return TokenOrder(call.scratch["sides"][1].order)

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """Log of the mass of the clusters, spread over the blocks that hold them."""
        rows, columns = self._spread(call, q_blocks), self._spread(call, k_blocks, 1)
        shares = self._cluster_scores(call, columns.sum(2)).softmax(-1)
        per_token = columns / columns.sum(2, keepdim=True).clamp(min=1)
        return log_mass(rows @ shares @ per_token.transpose(-1, -2), (columns.sum(-1) > 0).unsqueeze(-2))

    def budget(self, q: Tensor, k: Tensor, call: CallContext) -> Budget:
        """Top-p over key clusters, the crossing one kept."""
        return TopP(mass=self.mass, least=self.least)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Blocks by density, or the cover of the chosen clusters. q, k `[B, H, N, D]`, sorted."""
        return self._cover(q, k, call) if self.density is None else super().select(q, k, call)

    def _cover(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The blocks that hold a token of a chosen cluster, and what choosing them cost."""
        q_blocks, k_blocks = self.blocks(call.layout)
        rows, columns = self._spread(call, q_blocks), self._spread(call, k_blocks, 1)
        scores = self.perturbed(self._cluster_scores(call, columns.sum(2)), call)
        text = torch.zeros(scores.shape[-1], dtype=torch.bool, device=q.device)
        text[min(self.key_clusters, -(-call.layout.video // 64)) :] = True
        chosen = select_blocks(scores, self.budget(q, k, call), text).to(rows.dtype)
        cover = ((rows > 0).to(rows.dtype) @ chosen @ (columns > 0).to(rows.dtype).transpose(-1, -2)) > 0
        forced = self.forced(q, k, call, q_blocks, k_blocks)
        cover = cover if forced is None else cover | to_device(forced, cover.device)
        plan = plan_of_mask(cover, q_blocks, k_blocks, call.layout, (columns.sum(-1) > 0).unsqueeze(-2))
        pairs = (rows.sum(2).unsqueeze(-2) @ chosen @ columns.sum(2).unsqueeze(-1)).sum((-1, -2))
        exact = (pairs / (rows.sum((2, 3)) * columns.sum((2, 3)))).mean()
        call.measures["cluster_density"] = exact
        call.measures["over_computation"] = plan.density_per_head().mean() / exact
        return plan

    def _cluster_scores(self, call: CallContext, sizes: Tensor) -> Tensor:
        """Log-mass of each group of keys at the centroid of each group of queries, `[B, H, Gq, Gk]`."""
        queries, keys = (side.centroids for side in call.scratch["sides"])
        logits = queries.shape[-1] ** -0.5 * (queries @ keys.transpose(-1, -2))
        return logits + sizes.log().unsqueeze(-2)

    @staticmethod
    def _spread(call: CallContext, blocks: Blocking, side: int = 0) -> Tensor:
        """How many real tokens of each group stand in each block, `[B, H, n, G]`."""
        chosen: _Side = call.scratch["sides"][side]
        labels, groups = chosen.labels, chosen.centroids.shape[2]
        real = real_tokens(labels.shape[-1], call.layout.valid, labels.device).unsqueeze(1)
        cell = blocks.block_of_token().to(labels.device) * groups + labels
        counts = chosen.centroids.new_zeros(*labels.shape[:2], blocks.count * groups)
        counts.scatter_add_(-1, cell, real.to(counts.dtype).expand_as(labels))
        return counts.unflatten(-1, (blocks.count, groups))


def _with_text(x: Tensor, layout: TokenLayout, size: int, centroids: Tensor, labels: Tensor, index: Tensor) -> _Side:
    """The groups of the whole sequence, from those of the sorted video tokens: labels and index `[B, H, video]`."""
    order = video_order(layout, index).query
    blocks = layout.blocks(size)
    text = layout.text_blocks(blocks).to(x.device)
    means, _ = block_means(x, blocks, layout.valid)
    empty = torch.zeros_like(centroids[:, :, :1])
    groups = torch.cat([centroids, empty, means[:, :, text]], 2)
    number = centroids.shape[2] + text.cumsum(0)
    everything = number[blocks.block_of_token().to(x.device)].expand(*labels.shape[:2], -1).clone()
    everything[..., layout.video_slice()] = labels
    return _Side(groups, everything, order)
