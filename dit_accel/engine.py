"""The one path that every attention call of every family and method takes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.guard import Guard
from dit_accel.hoisting import Standing
from dit_accel.kernels.attention import request_of
from dit_accel.kernels.dense import fastest_first
from dit_accel.kernels.registry import choose_backend
from dit_accel.layer_methods import Groups, LayerGroup, LayerMethods
from dit_accel.layout import TextPosition, TokenLayout
from dit_accel.methods.base import Method
from dit_accel.parts import Part, join, known_density, of_heads
from dit_accel.planner import QKV, Planner, PlanRequest
from dit_accel.report.plan_picture import PlanPicture, picture
from dit_accel.report.records import CallRecord
from dit_accel.schedule import Schedule
from dit_accel.shard import HeadShard, TokenShard
from dit_accel.siblings import Siblings
from dit_accel.state import RunState


@dataclass(frozen=True)
class DenseCall:
    """A call that ran dense, for `Engine.observer`; q, k, v, out are `[B, H, N, D]` in raster order."""

    component: str
    layer: int
    state: RunState
    layout: TokenLayout
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor


class Engine:
    """Runs a method over the attention layers of one transformer.

    Args:
        method: the policy.
        schedule: when it runs.
        layers: attention modules in execution order; a layer's index is its place here.
        component: name of the transformer in the pipeline, for the report.
        backend: backend of `block_attention`, default "auto".
        break_even: density above which a call runs dense because dense is faster. None: as measured for the backend.
            1.0: never.
        seed: seed for methods that draw random numbers.
        hoist: offer an order that all layers share to whoever can put the tokens into it once per pass (`standing`).

    `siblings` holds the engines of all transformers of the pipeline, which take turns in one run.
    """

    def __init__(
        self,
        method: Method,
        schedule: Schedule,
        layers: list[nn.Module],
        component: str = "transformer",
        backend: str = "auto",
        break_even: float | None = None,
        seed: int = 0,
        hoist: bool = True,
    ) -> None:
        self.method, self.schedule, self.component, self.backend = method, schedule, component, backend
        self.break_even, self.seed = break_even, seed
        self.calls: list[CallRecord] = []
        self.pictures: dict[int, list[PlanPicture]] = {}
        self.guard = None if schedule.max_error is None else Guard(schedule.max_error, seed)
        self.observer: Callable[[DenseCall], None] | None = None
        self.state: RunState | None = None
        self.siblings: Siblings[Engine] = Siblings(self)
        self._layer_of = {module: index for index, module in enumerate(layers)}
        self.methods = LayerMethods(method, schedule, len(layers))
        self.methods.check_model([getattr(module, "heads", None) for module in layers])
        self._planner = Planner(schedule, seed)
        self.standing = Standing(self.methods.all, schedule.min_tokens, hoist)

    @property
    def is_dense(self) -> bool:
        """No call ever runs a method."""
        return self.methods.are_dense

    @property
    def grid(self) -> tuple[int, int, int]:
        """Token grid of the forward pass under way."""
        return self.running.grid

    def begin(self, state: RunState) -> None:
        """Take note of the forward pass that starts; forget everything when it starts a new generation."""
        if self.state is None or state.generation != self.state.generation:
            self.reset()
            # What the other expert of a run before has reported is no part of a run that begins.
            for engine in self.siblings if state.step == 0 else (self,):
                engine.calls, engine.pictures = [], {}
        self.state = state
        self.standing.begin()

    def end(self) -> None:
        """No forward pass is under way, nor will be: forget all but the report of the latest generation."""
        self.reset()
        self.state = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Engine:
        """An engine with the same settings for the copies of the layers, without a history.

        So a copied pipeline is accelerated as the original is, and both know nothing of each other.
        """
        copied = memo[id(self)] = Engine.__new__(Engine)
        settings = (self.component, self.backend, self.break_even, self.seed, self.standing.is_allowed)
        # Known to `memo` before the layers are copied, whose processors hold this engine.
        Engine.__init__(copied, self.method, self.schedule, copy.deepcopy([*self._layer_of], memo), *settings)
        copy.deepcopy(self.siblings, memo).join(copied)
        return copied

    def reset(self) -> None:
        """Forget what was kept between calls (plans that depend on q and k, centroids, statistics, errors)."""
        self._planner.reset()
        if self.guard is not None:
            self.guard.reset()

    @torch.compiler.disable
    def attend(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dense: Callable[[], Tensor],
        text: TextPosition = "none",
        reason: str | None = None,
        valid: tuple[int, ...] | None = None,
        shard: HeadShard | TokenShard | None = None,
    ) -> Tensor:
        """One attention call.

        Args:
            module: the attention module, which says the layer.
            q, k, v: `[B, N, H, D]`, the axis order of Diffusers; q `[B, n, H, D]` with a share of the tokens.
            dense: computes the call as the stock processor would.
            text: where text stands in the sequence; its tokens are those beyond the grid. Default: there is none.
            reason: why no method can run this call (a mask that is no valid length), for the report. Default: it can.
            valid: valid tokens per batch item, text and video, where the call itself says so. Default: as the state
                of the forward pass says.
            shard: which heads of the model q, k, v hold, or which tokens q holds, where several processes share them.
                Default: all.

        Returns:
            Like q.
        """
        state, layer = self.running, self._layer_of[module]
        method, layout = self.methods.of_layer(layer), self._layout(state, text, k.shape[1], valid)
        record = CallRecord(
            self.component, layer, state.step, state.branch, state.generation, method.name, method.requested_density
        )
        self.calls.append(record)
        self.standing.report_to(record)
        record.reason = reason or self._reason(layer, state, layout, k)
        searches = record.reason is not None and self._searches(layer, state, layout, record.reason)
        if record.reason is None or searches:
            qkv = (q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
            heads = shard if isinstance(shard, HeadShard) else HeadShard(0, q.shape[2], q.shape[2])
            tokens = shard if isinstance(shard, TokenShard) else None
            groups = self.methods.groups(layer, heads, q.device, state.step)
            if searches:
                self._search(groups, layer, layout, qkv, record)
            elif (out := self._attend(groups, layer, layout, qkv, tokens, record)) is not None:
                return out.transpose(1, 2)
        # A method that is dense throughout leaves the call as it is without this library.
        with record.timed("attend", q.device), nullcontext() if self.is_dense else fastest_first(q):
            out = dense()
        if self.observer is not None and reason is None and q.shape[1] == layout.tokens:
            heads_first = self.standing.in_raster(layout, *(x.transpose(1, 2) for x in (q, k, v, out)))
            self.observer(DenseCall(self.component, layer, state, layout, *heads_first))
        return out

    def _attend(
        self, groups: Groups, layer: int, layout: TokenLayout, qkv: QKV, tokens: TokenShard | None, record: CallRecord
    ) -> Tensor | None:
        """The methods' way, q, k, v `[B, H, N, D]`; None, with the reason recorded, when dense is faster."""
        q, k, v = qkv
        asked = tuple(group.method for group in groups)
        if self.guard is not None:
            groups = self._guarded(self.guard, groups, layout, record)
            if record.reason is not None:
                return None
        parts = [self._part(group, layer, layout, qkv, tokens, record) for group in groups]
        shares = [1.0 if part.heads is None else len(part.heads) / q.shape[1] for part in parts]
        # A density that is not known counts as none, so that what is said to be above the limit is.
        known = [known_density(part.planned, part.method) for part in parts]
        names = ", ".join(dict.fromkeys(part.computed_by for part in parts))
        limit = max((part.backend.break_even for part in parts), default=1.0)
        limit = limit if self.break_even is None else self.break_even
        # Where heads differ, those above the limit run dense by themselves, and the others need not follow them.
        some_are_dense = any(part.is_dense for part in parts) and not all(part.is_dense for part in parts)
        density: float | Tensor = sum(s * (d or 0.0) for s, d in zip(shares, known, strict=True))
        if density > limit and not some_are_dense:
            record.reason = f"density {density:.3f} is above the break-even {limit:.2f} of backend {names!r}"
            if self.guard is not None:
                self.guard.ran_dense((layer, record.branch), asked, record.step)
            return None
        density = sum((s * part.density for s, part in zip(shares, parts, strict=True)), start=0.0)
        record.density, record.backend = density, names or "none"
        if layer not in self.pictures:
            self.pictures[layer] = [picture(part.planned.plan, record, part.method.name) for part in parts]
        with record.timed("attend", q.device):
            out = join(parts, q)
        record.density = density + sum(s * part.call.extra_density for s, part in zip(shares, parts, strict=True))
        # A call that computed everything has no error, and says nothing about those that will not.
        is_whole = all(part.is_whole for part in parts)
        if self.guard is not None and not is_whole and self.guard.is_due((layer, record.branch), record.step):
            with record.timed("guard", q.device):
                record.error = self.guard.check((layer, record.branch), record.step, q, k, v, out, layout, density)
        return out

    @staticmethod
    def _guarded(guard: Guard, groups: Groups, layout: TokenLayout, record: CallRecord) -> Groups:
        """The groups at the density that the guard asks for; where none would do, the reason is recorded."""
        key, methods = (record.layer, record.branch), tuple(group.method for group in groups)
        methods, record.level, record.reason = guard.choose(key, methods, record.step, layout.tokens)
        if record.level and len(methods) == 1:
            record.requested = methods[0].requested_density
        return [group._replace(method=method) for method, group in zip(methods, groups, strict=True)]

    def _part(
        self,
        group: LayerGroup,
        layer: int,
        layout: TokenLayout,
        qkv: QKV,
        tokens: TokenShard | None,
        record: CallRecord,
    ) -> Part:
        """Order, plan and backend of one group of heads; q, k, v `[B, H, N, D]` of all heads."""
        state, (method, heads, key, speakers) = self.running, group
        qkv, standing = of_heads(qkv, heads), self.standing.order(layout)
        wanted = PlanRequest(method, layer, layout, state, standing, tokens, key, speakers)
        planned, qkv = self._planner.plan(wanted, qkv, record)
        request = request_of(qkv[0], planned.plan, method.remainder, method.completes, method.precision)
        call = self._planner.call(wanted, len(qkv[0]))
        backend = choose_backend(self.backend, request)
        limit = backend.break_even if self.break_even is None else self.break_even
        # An explicit backend computes every head, and padding needs the lengths that only it knows.
        may_be_dense = self.backend == "auto" and heads is not None and not layout.is_padded
        is_dense = may_be_dense and (known_density(planned, method) or 0.0) > limit
        return Part(heads, method, planned, qkv, call, backend, is_dense)

    def _searches(self, layer: int, state: RunState, layout: TokenLayout, reason: str) -> bool:
        """Whether a call that the schedule makes dense plans for the steps that follow."""
        timetable = self.schedule.dense_reason(layer, state.step, state.noise, layout.tokens)
        return reason == timetable and self.schedule.searches(layer, state.step, layout.tokens)

    def _search(self, groups: Groups, layer: int, layout: TokenLayout, qkv: QKV, record: CallRecord) -> None:
        for member, heads, key, speakers in groups:
            taken, standing = of_heads(qkv, heads), self.standing.order(layout)
            wanted = PlanRequest(member, layer, layout, self.running, standing, None, key, speakers)
            self._planner.search(wanted, taken, record)

    def _reason(self, layer: int, state: RunState, layout: TokenLayout, k: Tensor) -> str | None:
        if self.is_dense:
            return "method is dense"
        if k.shape[1] != layout.tokens:
            return f"the call has {k.shape[1]} tokens where the geometry says {layout.tokens}"
        if layout.pads_video and (moving := self.methods.moves_padding(layer, state.step)) is not None:
            return f"padding reaches into the video, whose tokens method {moving!r} moves"
        return self.schedule.dense_reason(layer, state.step, state.noise, layout.tokens)

    @staticmethod
    def _layout(state: RunState, text: TextPosition, tokens: int, valid: tuple[int, ...] | None = None) -> TokenLayout:
        video = TokenLayout(state.grid, prefix_frames=state.prefix_frames)
        words = tokens - video.tokens
        if text == "none" or words <= 0:
            return video if words or valid is None else replace(video, valid=valid)
        if valid is None and state.text_valid is not None:
            valid = tuple(video.tokens + n for n in state.text_valid)
        return TokenLayout(state.grid, words, text, valid, state.prefix_frames)

    @property
    def running(self) -> RunState:
        """What is known about the forward pass under way.

        Raises:
            RuntimeError: there is none.
        """
        if self.state is None:
            raise RuntimeError(
                "attention was called outside the transformer's forward pass, so its geometry is unknown"
            )
        return self.state
