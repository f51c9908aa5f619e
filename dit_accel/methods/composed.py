"""Order, selection, remainder and precision, each chosen by name; most methods of this package are presets of it."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.kernels.spec import Precision, PrecisionName, Remainder
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import FROM_LIST, BlockSize, Count, Density, Method, Size, SizeTriple
from dit_accel.methods.composed_rules import conflicts
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.orders.ordering import AngularHash, HotKeys, InSpace, KMeans, Ordering, OrderName
from dit_accel.orders.space import Axes
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.remainders.history import history_of, with_history
from dit_accel.remainders.partial import PartialAttention
from dit_accel.remainders.rectified import isolated_scores, rectify
from dit_accel.selection import (
    Budget,
    Rounding,
    Threshold,
    TopK,
    TopP,
    adapt_heads,
    own_blocks,
    pooled_scores,
    routing_noise,
    select_plan,
    sink_blocks,
)
from dit_accel.selection.covariance import covariance_scores, error_scores
from dit_accel.selection.neighbours import touching_blocks
from dit_accel.selection.scores import antidiagonal_scores, subblock_scores
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext
from dit_accel.transfer import to_device

Score = Literal["pooled", "isolated", "covariance", "error", "antidiagonal", "subblock"]
RemainderName = Literal["drop", "pooled", "taylor", "rectified", "history"]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Number = Annotated[float, Field(ge=0, allow_inf_nan=False)]

_EVERY_HEAD = BeforeValidator(lambda value: (value,) if isinstance(value, str) else tuple(value))


@register("composed")
class Composed(Method):
    """Any order with any selection, remainder and precision. Text rows and columns are always whole.

    Args:
        order: "raster"; "tile": 3-D tiles, one block each; "bisect": boxes of exactly `block` tokens on any grid;
            "morton": the Z-order curve; "hilbert": a Hilbert curve; "axes": the raster with its axes in another order.
            By content, per head: "hot_keys": keys sorted by the attention they get; "lsh": queries and keys sorted by
            an angular hash; "kmeans": queries and keys sorted by cluster.
        tile: (frames, height, width) of a tile, for "tile"; the shape of the boxes, for "bisect".
        block: block size in tokens, for all orders but "tile".
        query_block: that of the queries. Default None: as the keys.
        axes: "fhw" and its permutations, one for all heads or one per head, for "axes".
        segment: tokens within which "hot_keys" sorts. Default None: all video tokens.
        hot_share: share of the keys that "hot_keys" moves to the front; 1 sorts all.
        directions: random directions of "lsh".
        clusters: of "kmeans", for the queries and for the keys of a head; at most one per block of keys.
        rounds: of "kmeans", at first; later on it goes on from its centroids, with one round.
        renew: "kmeans" sorts anew after so many steps; in between tokens stand as they did.
        across_branches: the first guidance branch of a step decides for the others how "kmeans" sorts and which blocks
            are kept. Guidance multiplies what differs between branches, and so does it with errors unless they are
            alike. In one batch the conditional rows decide, if the pipeline calls it "cond_uncond", as Diffusers' do.
        score: what blocks are ranked by. "pooled": product of the mean query and the mean key; "isolated": the same,
            but text keys one by one; "covariance": pooled, plus the logarithm of what the mean key hides; "error": what
            an expansion about the mean query gets wrong, which compares rows and heads too;
            "antidiagonal" and "subblock": with `stride` tokens per group.
        stride: see `score`.
        density: share of key blocks that each query block attends exactly. None: `mass` or `tau` decides.
        densities: a density for every head, instead of `density`. None: `density` for all.
        rounding: how a density becomes a number of blocks.
        mass: keep the fewest blocks that hold this share of the scores' softmax, and at least `density`. None: no rule.
        tau: keep blocks whose score exceeds the mean of their row by so many standard deviations. None: no rule.
        scope: whose budget a density or a mass is: that of each "row", of a "head", whose rows compete for it by
            shares of their mass, or of the "layer", whose heads compete as well.
        heads: "adaptive": heads that reach a recall of 0.8 give blocks to the others (arXiv 2502.21079).
        keep_self: every block attends itself; no effect with the orders by content.
        reach: neighbours in the order, on either side, that a block attends too, with `keep_self`.
        touching: every block attends those that touch it in the video.
        sink_frames: leading frames that every query attends; no effect with the orders by content.
        noise: amplitude of seeded noise on the scores, in units of their spread in a row, against flicker.
        remainder: what becomes of the rest. "drop"; "pooled": one mean key and value per block; "taylor": with a
            first-order term as well; "rectified": the mass that a pooled map gives (arXiv 2511.19835); "history": what
            it was at the last dense step (arXiv 2505.22918).
        first_order: of "taylor", see `Remainder`.
        group: blocks per group of the first-order term "grouped".
        about: the point of expansion of "pooled" and "taylor", "key" or "query", see `Remainder`.
        second_order: correct the mass of "pooled" and "taylor" about the key by a capped diagonal second-order term.
        gate: whether "rectified" trusts pooling only where spreads are small.
        period, ramp: of "history": steps between dense ones, and growth of the share of the selected part per step.
        precision: "input"; "int8": queries and keys of the exact part are quantised to 8 bits, keys smoothed;
            "int8_fp8": weights and values of the exact part, too (arXiv 2411.10958).
    """

    source: ClassVar[str] = "this project; remainder after arXiv 2602.01077"

    order_: OrderName = Field(default="tile", alias="order")
    tile: SizeTriple = (4, 4, 4)
    block: BlockSize = 64
    query_block: BlockSize | None = None
    axes: Annotated[tuple[Axes, ...], _EVERY_HEAD, Field(min_length=1)] = ("fhw",)
    segment: Size | None = None
    hot_share: Share = 1.0
    directions: Annotated[int, Field(ge=1, le=32)] = 7
    clusters: Size = 64
    rounds: Size = 2
    renew: Size = 1
    across_branches: bool = False
    score: Score = "pooled"
    stride: Size = 16
    density: Density | None = 0.25
    densities: Annotated[tuple[Density, ...], FROM_LIST, Field(min_length=1)] | None = None
    rounding: Rounding = "round"
    mass: Share | None = None
    tau: Annotated[float, Field(allow_inf_nan=False)] | None = None
    scope: Literal["row", "head", "layer"] = "row"
    heads: Literal["uniform", "adaptive"] = "uniform"
    keep_self: bool = True
    reach: Count = 0
    touching: bool = False
    sink_frames: Count = 0
    noise: Number = 0.0
    remainder_: RemainderName = Field(default="pooled", alias="remainder")
    first_order: Literal["block", "mixed", "grouped", "global"] = "grouped"
    group: Size = 32
    about: Literal["key", "query"] = "key"
    second_order: bool = False
    gate: bool = True
    period: Size = 5
    ramp: Number = 0.04
    precision_: PrecisionName = Field(default="input", alias="precision")

    @model_validator(mode="after")
    def _fits_together(self) -> Composed:
        if (conflict := next(conflicts(self), None)) is not None:
            raise ValueError(conflict)
        return self

    @property
    def keeps_shares(self) -> bool:
        """See `Method.keeps_shares`: no mass, threshold, ranking of heads or of a layer decides."""
        return self.mass is None and self.tau is None and self.heads == "uniform" and self.scope != "layer"

    @property
    def requested_density(self) -> float | None:
        """The density asked for, over all heads; None where another rule decides."""
        return self.density if self.densities is None else sum(self.densities) / len(self.densities)

    @property
    def ordering(self) -> Ordering:
        """The order, with its parameters."""
        if self.order_ == "hot_keys":
            return HotKeys(self.block, self.segment, self.hot_share)
        if self.order_ == "lsh":
            return AngularHash(self.directions)
        if self.order_ == "kmeans":
            return KMeans(self.clusters, self.block, self.rounds, self.renew, self.across_branches)
        return InSpace(self.order_, self.tile, self.block, self.axes)

    @property
    def has_static_order(self) -> bool:
        """Yes, but for the orders by content and those that differ from head to head."""
        return self.ordering.is_static

    @property
    def cycle(self) -> int:
        """Until both the order is made anew and all keys are computed."""
        return math.lcm(self.ordering.cycle, self.period if self.remainder_ == "history" else 1)

    @property
    def keeps_padding_last(self) -> bool:
        """As the order does."""
        return self.ordering.keeps_padding_last

    @property
    def orders_each_head(self) -> bool:
        """Yes, where the order is not the same for all heads."""
        return not self.ordering.is_static

    def check_model(self, heads: int) -> None:
        """Refuse orders and densities per head that are for another number of heads."""
        if self.order_ == "axes" and len(self.axes) not in (1, heads):
            raise ConfigError(f"method.{self.name}.axes", f"expected 1 or {heads} orders, got {len(self.axes)}")
        if self.densities is not None and len(self.densities) not in (1, heads):
            raise ConfigError(
                f"method.{self.name}.densities", f"expected one value per head, {heads}, got {len(self.densities)}"
            )

    def of_heads(self, shard: HeadShard) -> Self:
        """With the orders and densities of these heads."""
        axes, densities = self.axes, self.densities
        changed = {"axes": shard.cut(axes), "densities": None if densities is None else shard.cut(densities)}
        return self if changed == {"axes": axes, "densities": densities} else self.model_copy(update=changed)

    @property
    def decides_for_branches(self) -> bool:
        """As chosen."""
        return self.across_branches

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """As chosen; None for the raster. q, k, v `[B, H, N, D]`.

        Raises:
            ConfigError: parameters per head that are for another number of heads.
        """
        self.check_model(q.shape[1])
        return self.ordering.order(q, k, call)

    def blocks(self, layout: TokenLayout) -> Blocking:
        """The blocks of the keys in the chosen order, and of the queries unless they have their own."""
        return self.ordering.blocks(layout, self.block)

    def query_blocks(self, layout: TokenLayout) -> Blocking:
        """The blocks of the queries in the chosen order."""
        return self.blocks(layout) if self.query_block is None else layout.blocks(self.query_block)

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Score, choose, and make the plan. q, k `[B, H, N, D]`."""
        if (held := self.held_plan(call)) is not None:
            return held
        layout, q_blocks, k_blocks = call.layout, self.query_blocks(call.layout), self.blocks(call.layout)
        scores = routing_noise(
            self.scores(q, k, call, q_blocks, k_blocks), self.noise, call.seed, call.layer, call.step
        )
        if self.scope != "row" and self.score != "error":
            scores = scores.log_softmax(-1).masked_fill(scores.isneginf(), -torch.inf)
        forced = self.forced(layout, q_blocks, k_blocks, q.device)
        return select_plan(scores, self._budget(scores, forced), q_blocks, k_blocks, layout, forced)

    @property
    def holds_plans(self) -> bool:
        """With the remainder "history": until the next refresh."""
        return self.remainder_ == "history"

    def held_plan(self, call: CallContext) -> BlockPlan | None:
        """The plan that the kept remainder is left by."""
        kept = history_of(call, self.period, self) if self.holds_plans else None
        return None if kept is None else kept.plan

    def scores(self, q: Tensor, k: Tensor, call: CallContext, q_blocks: Blocking, k_blocks: Blocking) -> Tensor:
        """What blocks are ranked by, `[B, H, nq, nk]`. q, k `[B, H, N, D]`."""
        layout = call.layout
        if self.score in ("covariance", "error"):
            scorer = covariance_scores if self.score == "covariance" else error_scores
            return scorer(q, k, k if call.values is None else call.values, q_blocks, layout, k_blocks)
        if self.score == "antidiagonal":
            return antidiagonal_scores(q, k, q_blocks, k_blocks, layout, self.stride)
        if self.score == "subblock":
            q_parts, k_parts = (-(-blocks.size // self.stride) for blocks in (q_blocks, k_blocks))
            return subblock_scores(q, k, q_blocks, k_blocks, layout, q_parts, k_parts)
        if self.score == "isolated":
            return isolated_scores(q, k, k_blocks, layout)
        return pooled_scores(q, k, q_blocks, layout, k_blocks)

    def forced(self, layout: TokenLayout, q_blocks: Blocking, k_blocks: Blocking, device: torch.device) -> Tensor:
        """Blocks that are kept whatever their score, bool that broadcasts against the scores."""
        ordering, order, sink = self.ordering, None, 0
        mask = torch.zeros(q_blocks.count, k_blocks.count, dtype=torch.bool)
        if isinstance(ordering, InSpace):
            order, sink = ordering.of_layout(layout), self.sink_frames
            if self.keep_self:
                mask |= own_blocks(q_blocks, k_blocks, self.reach)
        if self.touching:
            mask |= touching_blocks(layout, k_blocks, order)
        mask |= ordering.leading_blocks(layout, k_blocks)
        if sink or layout.prefix_frames:
            # An order by content leaves the keys of conditioning frames where they are.
            mask = mask | sink_blocks(layout, k_blocks, sink, order).unsqueeze(-2)
        return to_device(mask, device)

    def _budget(self, scores: Tensor, forced: Tensor) -> Budget:
        if self.tau is not None:
            return Threshold(tau=self.tau)
        if self.mass is not None:
            return TopP(scope=self.scope, mass=self.mass, least=self.density or 0.0)
        share: Any = self.density if self.densities is None else torch.tensor(self.densities, dtype=torch.float64)
        if self.heads == "adaptive":
            share = adapt_heads(scores, share, forced)
        return TopK(scope=self.scope, share=share, rounding=self.rounding)

    @property
    def remainder(self) -> Remainder | None:
        """As chosen; None also where `complete` makes it."""
        if self.remainder_ not in ("pooled", "taylor"):
            return None
        first = self.first_order if self.remainder_ == "taylor" else "none"
        return Remainder("diagonal" if self.second_order else "mean", first, self.group, self.about)

    @property
    def precision(self) -> Precision | None:
        """As chosen."""
        return Precision.named(self.precision_)

    @property
    def completes(self) -> bool:
        """Whether the remainder is one that is made after the kernel."""
        return self.remainder_ in ("rectified", "history")

    def extra_density(self, layout: TokenLayout) -> float:
        """With the remainder "history" everything, every `period` steps."""
        return 1 / self.period if self.holds_plans else 0.0

    def complete(self, part: PartialAttention) -> Tensor:
        """The rectified remainder, or that of earlier steps."""
        if self.remainder_ == "rectified":
            return rectify(part, gate=self.gate)
        if self.remainder_ == "history":
            return with_history(part, self.period, self.ramp, self)
        return part.out
