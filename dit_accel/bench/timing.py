"""Timing that is fair: interleaved rounds, ratios within a round, medians and quartiles; and the dense baseline."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from dit_accel.kernels.dense import dense_attention, exact_backends

T = TypeVar("T")
_PROBE_QUERIES = 2048
DenseRun = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of a few figures."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarise; with fewer than four values the quartiles are the extremes."""
        if len(values) < 4:
            return cls(statistics.median(values), min(values), max(values))
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


def clock_for(device: torch.device) -> Callable[[], float]:
    """The clock that measures work on a device, in seconds.

    Where one thread of the CPU does all the work, the time of this process alone, which other work on the machine does
    not lengthen; else the wall clock.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def timed(run: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """Seconds of one call by the clock for the device, whose work is included, and what it returns."""
    clock = clock_for(device)
    _wait(device)
    begun = clock()
    value = run()
    _wait(device)
    return clock() - begun, value


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call by the clock for the device, whose work is included."""
    return timed(run, device)[0]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Call every run once per round, in an order that shifts by one each round; one list of times per run.

    Each run times itself, so that it can leave preparations out. A slow drift of the machine hits all runs alike.
    """
    times: list[list[float]] = [[] for _ in runs]
    for number in range(rounds):
        for place in range(len(runs)):
            index = (place + number) % len(runs)
            times[index].append(runs[index]())
    return times


def ratios(base: Sequence[float], other: Sequence[float]) -> Spread:
    """How many times faster `other` is than `base`, paired by round."""
    return Spread.of([b / o for b, o in zip(base, other, strict=True)])


def fastest_dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, DenseRun]:
    """The dense attention that is fastest here on q, k, v `[B, H, N, D]`, by the best of two calls after a first.

    On a CPU, whose cores work on a few queries at a time, the first 2,048 queries decide; a GPU needs all to be full.

    Raises:
        RuntimeError: none can run.
    """
    best: tuple[float, str, DenseRun] | None = None
    q = q[:, :, :_PROBE_QUERIES] if q.device.type == "cpu" else q
    for name in exact_backends(q):
        run = partial(dense_attention, backend=name)
        try:
            run(q, k, v)
            taken = min(seconds(partial(run, q, k, v), q.device) for _ in range(2))
        except RuntimeError:  # a backend of PyTorch that does not take this dtype or head size says so like this
            continue
        if best is None or taken < best[0]:
            best = (taken, name, run)
    if best is None:
        raise RuntimeError(f"no dense attention runs on {q.device} in {q.dtype} with head_dim {q.shape[-1]}")
    return best[1], best[2]


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device in bytes; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
