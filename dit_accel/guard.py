"""The guard: the error of every sparse call is estimated from a few exact rows, and kept under a budget."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dit_accel.error_estimate import estimate_error, rows_to_check, sample_rows
from dit_accel.errors import ConfigError
from dit_accel.head_densities import at_density
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method

_GROWTH = 1.5  # of the density, per level
_DENSE_FROM = 0.9  # a density at which nothing is saved any more
_CALM = 3  # checks in a row far under budget before the density falls again
_FAR_UNDER = 0.5
_HOLD, _LONGEST_HOLD = 4, 64  # steps that a layer stays dense before it is tried again
_EVERY_STEP_FROM = 12_000  # tokens; in shorter sequences reading all keys for a few rows costs over 1 % of a call

Key = tuple[int, str]


@dataclass
class _Reading:
    """Three figures on their way to the host: estimate, bound, density. Reading them waits for this copy alone."""

    host: Tensor
    event: torch.cuda.Event | None = None

    @classmethod
    def of(cls, values: Tensor) -> _Reading:
        if values.device.type != "cuda":
            return cls(values.cpu())
        host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        return cls(host, event)

    def values(self) -> tuple[float, float]:
        """Bound and density."""
        if self.event is not None:
            self.event.synchronize()
        return float(self.host[1]), float(self.host[2])


@dataclass
class _Track:
    """What the guard knows about one layer and guidance branch."""

    level: int = 0
    calm: int = 0
    hold: int = _HOLD
    dense_until: int = 0
    due: int = 0
    density: float | None = None
    bound: float = 0.0
    reading: _Reading | None = None


@dataclass
class Guard:
    """Keeps the relative error of every layer under a budget by raising its density, or running it dense.

    A bound over the budget raises the density of the layer's methods by a factor of 1.5, more than once when the
    excess is large. The layer runs dense when there is no density left to raise; it is tried again after 4 steps,
    then 8, 16, ... The density falls by one level after three checks in a row under half the budget (hysteresis).
    Below 12,000 tokens a layer that keeps to the budget is checked every second or third step on average, so that
    checks stay under 1 % of the time of attention; one that does not, at every step. The steps are drawn, so that no
    period of a method or schedule can hide from them.

    Args:
        max_error: the budget.
        seed: seed of the sampled rows, and of the steps.
    """

    max_error: float
    seed: int = 0
    _tracks: dict[Key, _Track] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget everything, as at the start of a generation."""
        self._tracks.clear()

    def choose(
        self, key: Key, methods: tuple[Method, ...], step: int, tokens: int
    ) -> tuple[tuple[Method, ...], int, str | None]:
        """The methods to run, their level, and why the call must run dense (None: it need not).

        Args:
            key: layer and guidance branch.
            methods: the methods asked for: one, or one per group of heads.
            step: denoising step.
            tokens: length of the sequence.
        """
        if rows_to_check(tokens) == 0:
            return methods, 0, f"guard: {tokens} tokens are too few to check under 1 % of the rows"
        track = self._tracks.setdefault(key, _Track())
        reading, track.reading = track.reading, None
        if reading is not None:
            self._judge(track, *reading.values(), methods, step)
        if step < track.dense_until:
            told = f"{track.bound:.3g}, dense until step {track.dense_until}"
            return methods, track.level, f"guard: the error bound is over max_error {self.max_error:g}; {told}"
        return _raised(methods, track) or methods, track.level, None

    def is_due(self, key: Key, step: int) -> bool:
        """Whether the call of a layer and branch at a step is to be checked."""
        track = self._tracks.get(key)
        return track is None or step >= track.due

    def check(
        self,
        key: Key,
        step: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        layout: TokenLayout,
        density: float | Tensor,
    ) -> Tensor:
        """Estimate the error of one call, and remember it for the next step. No synchronisation with the device.

        Args:
            key: layer and guidance branch.
            step: denoising step.
            q, k, v: `[B, H, N, D]` in raster order.
            out: what the method computed, `[B, H, N, D]`.
            layout: token geometry; padding is neither sampled nor attended.
            density: share of pairs that the method computed.

        Returns:
            Estimate and upper bound of the relative error, fp32 `[2]`.
        """
        lengths = layout.valid or (layout.tokens,) * q.shape[0]
        drawn = sample_rows(out, lengths, rows_to_check(layout.tokens), hash_seed(self.seed, key, step))
        error = estimate_error(q, k, v, out, *drawn, lengths)
        computed = density.to(error) if isinstance(density, Tensor) else error.new_tensor(density)
        values = torch.cat([error, computed.reshape(1)])
        track = self._tracks.setdefault(key, _Track())
        track.reading, track.due = _Reading.of(values), step + self._steps_between(key, step, layout.tokens)
        return error

    def _steps_between(self, key: Key, step: int, tokens: int) -> int:
        """Steps to the next check: drawn, since errors may come and go with a period (kept plans, kept remainders)."""
        mean = math.ceil(_EVERY_STEP_FROM / tokens)
        return 1 + int(random.Random(hash_seed(self.seed, key, step)).random() * (2 * mean - 1))

    def _judge(self, track: _Track, bound: float, density: float, methods: tuple[Method, ...], step: int) -> None:
        """Act on the last check."""
        track.bound = bound
        if track.level == 0:
            track.density = density
        if not bound <= self.max_error:  # NaN is over any budget
            excess = bound / self.max_error
            track.level += max(1, math.ceil(math.log2(excess))) if math.isfinite(excess) else 1
            track.calm, track.due = 0, step
            if _raised(methods, track) is None:
                self._go_dense(track, methods, step)
        elif bound < _FAR_UNDER * self.max_error:
            track.calm += 1
            if track.calm >= _CALM and track.level:
                track.level, track.calm, track.hold, track.due = track.level - 1, 0, _HOLD, step
        else:
            track.calm = 0

    def ran_dense(self, key: Key, methods: tuple[Method, ...], step: int) -> None:
        """Take note that a call at a raised density ran dense after all, because dense is faster there.

        Args:
            key: layer and guidance branch.
            methods: the methods asked for, as in `choose`.
            step: denoising step.
        """
        track = self._tracks.setdefault(key, _Track())
        if track.level:
            track.level -= 1
            self._go_dense(track, methods, step + 1)

    @staticmethod
    def _go_dense(track: _Track, methods: tuple[Method, ...], step: int) -> None:
        """Dense for a while, each time twice as long; then again at the highest level that is not dense."""
        track.dense_until, track.hold = step + track.hold, min(2 * track.hold, _LONGEST_HOLD)
        while _raised(methods, track) is None:
            track.level -= 1


def _raised(methods: tuple[Method, ...], track: _Track) -> tuple[Method, ...] | None:
    """The methods at the density of the track's level; None where one of them cannot be raised so far."""
    raised = []
    for method in methods:
        if track.level and method.name != "dense":
            density = (method.requested_density or track.density or 1.0) * _GROWTH**track.level
            if "density" not in type(method).model_fields or density >= _DENSE_FROM:
                return None
            try:
                method = at_density(method, density)
            except ConfigError:  # the method takes no density beside its other parameters
                return None
        raised.append(method)
    return tuple(raised)


def hash_seed(seed: int, key: Key, step: int) -> int:
    """A seed of its own for every call, the same in every process."""
    words = f"{seed}/{key[0]}/{key[1]}/{step}".encode()
    return int.from_bytes(words, "big") % (2**61 - 1)
