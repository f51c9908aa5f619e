"""The order of video tokens that all heads, layers and steps of a run share, and whether the tokens stand in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder, permute, video_order
from dit_accel.report.records import CallRecord
from dit_accel.state import CallContext, RunState

_LAYOUTS_KEPT = 32


class Standing:
    """How the video tokens of one transformer stand between its first block and its last: in the raster, or not.

    Args:
        methods: gives every method that some head of some layer runs under.
        min_tokens: shorter sequences run dense, so that no order is wanted.
        hoist: False: always the raster.
    """

    def __init__(self, methods: Callable[[], Iterable[Method]], min_tokens: int, hoist: bool) -> None:
        self._methods, self._min_tokens, self.is_allowed = methods, min_tokens, hoist
        self._common: dict[TokenLayout, Tensor | None] = {}
        self._orders: dict[TokenLayout, TokenOrder] = {}
        self._ordered: Tensor | None = None
        self._index: Tensor | None = None
        self._entry: CallRecord | None = None

    @property
    def is_hoisted(self) -> bool:
        """Whether the tokens of the pass under way, or else of the latest, do not stand in the raster."""
        return self._index is not None

    def begin(self) -> None:
        """A forward pass begins: its tokens stand in the raster until `set` says otherwise."""
        self._index, self._entry = None, None

    def wanted(self, state: RunState) -> Tensor | None:
        """The order, int64 `[video]` on the CPU, in which all layers want the video tokens; None where there is none.

        It is the same for all passes of a generation, dense ones too, so that what step caches keep of one pass fits
        the next. Whoever puts the tokens into it says so by `set`.
        """
        layout = TokenLayout(state.grid, prefix_frames=state.prefix_frames)
        if not self.is_allowed or layout.tokens < self._min_tokens:
            return None
        if layout not in self._common:
            self._common = {layout: common_order(self._methods(), layout)}
        return self._common[layout]

    def set(self, index: Tensor) -> None:
        """In the pass under way the video tokens come in the order `index`, which `wanted` gave."""
        if index is not self._ordered:
            self._orders, self._ordered = {}, index
        self._index = index

    def order(self, layout: TokenLayout) -> TokenOrder | None:
        """How the tokens of a call stand in the pass under way; None: in the raster."""
        if self._index is None:
            return None
        found = self._orders.get(layout)
        if found is None:
            if len(self._orders) >= _LAYOUTS_KEPT:
                self._orders.clear()
            found = self._orders[layout] = video_order(layout, self._index)
        return found

    def in_raster(self, layout: TokenLayout, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors `[B, H, N, D]` of a call as they stand in the raster."""
        order = self.order(layout)
        return tensors if order is None else tuple(permute(x, order.inverse.to(x.device)) for x in tensors)

    def timed(self, state: RunState, device: torch.device) -> AbstractContextManager[None]:
        """Times what is done outside the layers to put tokens in order; the first call of the pass reports it."""
        if self._entry is None:
            self._entry = CallRecord("", -1, state.step, state.branch, state.generation, "", None)
        timer: AbstractContextManager[None] = self._entry.timed("order", device)
        return timer

    def report_to(self, record: CallRecord) -> None:
        """Let `record` report what `timed` measures, if it is the first of the pass."""
        if self._entry is not None and self._entry.layer < 0:
            self._entry.layer = record.layer
            record.adopt("order", self._entry)


def common_order(methods: Iterable[Method], layout: TokenLayout) -> Tensor | None:
    """The one order that every method but "dense" chooses on `layout`, int64 `[video]`.

    None where an order depends on queries and keys, where heads differ, or queries from keys, where two methods differ,
    and where it is the raster.

    Args:
        methods: what runs somewhere.
        layout: a grid without text.
    """
    found: Tensor | None = None
    raster = torch.arange(layout.video)
    for method in methods:
        if method.name == "dense":
            continue
        if not method.has_static_order:
            return None
        nothing = torch.empty(1, 1, layout.video, 0)  # a static order looks at no token
        order = method.order(nothing, nothing, nothing, CallContext(layout))
        if order is not None and not order.is_shared:
            return None
        index = raster if order is None else order.query.cpu()
        if found is not None and not torch.equal(found, index):
            return None
        found = index
    return None if found is None or torch.equal(found, raster) else found
