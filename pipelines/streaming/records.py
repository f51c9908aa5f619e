"""What the attention calls of a stream computed: a record per call of the latest chunk, and sums of those before."""

from __future__ import annotations

from collections import deque
from typing import Any

from torch import Tensor

from dit_accel.kernels import block_attention
from dit_accel.kernels.attention import request_of
from dit_accel.kernels.registry import choose_backend
from dit_accel.plan import BlockPlan
from dit_accel.report.records import CallRecord, Report

SUMMARIES = 1000
"""Chunks whose sums are kept, the newest ones, so that the report of an endless stream does not grow without end."""
BRANCHES = ("cond", "uncond")
"""Names of the guidance branches of a stream, in the order in which a driver holds them."""


def record_call(layer: int, step: int, branch: str, chunk: int, method: str, requested: float | None) -> CallRecord:
    """A record of one call of a stream's transformer.

    Args:
        layer, step, branch: as in `CallRecord`; the step is -1 in the pass that writes a finished chunk to the cache.
        chunk: counted from 0; stands as the record's `generation`.
        method: name of the policy, or of the method inside the window.
        requested: density asked for, where one is.
    """
    return CallRecord("transformer", layer, step, branch, chunk, method, requested)


def run_plan(record: CallRecord, q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, **options: Any) -> Tensor:
    """`block_attention` of q `[B, H, N, D]` over k, v `[B, H, M, D]`, noted in `record`; `options` are its own."""
    request = request_of(q, plan, options.get("remainder"), precision=options.get("precision"))
    record.backend = choose_backend("auto", request).name
    record.density = plan.density_per_head().mean()  # a tensor: reading it here would wait for the device
    with record.timed("attend", q.device):
        out: Tensor = block_attention(q, k, v, plan, backend=record.backend, **options)
    return out


class StreamCalls:
    """The calls since the last chunk was finished, those of that chunk, and a sum of each chunk before.

    What runs between two chunks (the cache is written, the window is run again under a new prompt) counts for the later
    one. A chunk is summed up when the next one is finished: reading its times does not make the device wait.
    """

    def __init__(self) -> None:
        self.chunk = self._first = 0
        self._running: list[CallRecord] = []
        self._latest: list[CallRecord] = []
        self._sums: deque[dict[str, Any]] = deque(maxlen=SUMMARIES)

    def append(self, record: CallRecord) -> None:
        """Keep the record of a call that begins."""
        self._running.append(record)

    def finish_chunk(self) -> None:
        """The calls so far were those of one chunk, generated or given."""
        if self.chunk > self._first:
            self._sums.append(_summed(self.chunk, self._latest))
        self._latest, self._running = self._running, []
        self.chunk += 1

    def begin_at(self, chunk: int) -> None:
        """Forget everything; the next chunk that is finished is number `chunk`, counted from 0."""
        self.chunk = self._first = chunk
        self._running, self._latest = [], []
        self._sums.clear()

    def report(self, settings: dict[str, Any]) -> Report:
        """The calls of the latest finished chunk; `settings` as in `Report`."""
        return Report(self._latest, settings)

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """Sums per chunk, oldest first, the newest `SUMMARIES` and the latest one.

        Each holds "chunk" (from 1), "calls" (their number), "density", "sparse_density" (None without such calls),
        "seconds" by phase and "dense_reasons". May wait for the device.
        """
        return [*self._sums, *([_summed(self.chunk, self._latest)] if self.chunk > self._first else [])]


def _summed(number: int, calls: list[CallRecord]) -> dict[str, Any]:
    report = Report(calls, {})
    return {
        "chunk": number,
        "calls": len(calls),
        "density": report.density if calls else None,
        "sparse_density": report.sparse_density,
        "seconds": {phase: round(seconds, 6) for phase, seconds in report.seconds.items()},
        "dense_reasons": report.dense_reasons,
    }
