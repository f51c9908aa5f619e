"""What calibration keeps: a few sums per range of steps, layer, head and candidate, which a killed run resumes from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.calibrate.clock import TIMES
from dit_accel.errors import ConfigError

FORMAT = "dit_accel.calibration/3"

_SUMS = ("error", "density", "calls", "time", "timings", "change")
_EXACT = 1e-6


@dataclass
class Statistics:
    """Sums over the calls seen, fp64 on the CPU. Axes: P ranges of steps, L layers, H heads, C candidates, G parts.

    Args:
        error: squared error of a head under a candidate, relative to the squared output of all heads of its layer,
            `[P, L, H, C]`.
        density: share of pairs that the candidate computed, `[P, L, H, C]`.
        calls: calls seen, `[P, L]`.
        time: times of the layer under a candidate, see `layer_times`, `[L, 4, C]`.
        timings: calls that were timed, `[L]`.
        change: mean squared change of the picture when a part of the layers runs the probe candidate in a range of
            steps and all else runs dense, `[P, G]`; G is 0 where no probes are made.
        done: prompts that are in the sums.
        probed: prompt, range of steps and part of each probe that is in `change`.
        seconds: time that the prompts took.
    """

    error: Tensor
    density: Tensor
    calls: Tensor
    time: Tensor
    timings: Tensor
    change: Tensor
    done: list[int] = field(default_factory=list)
    probed: list[tuple[int, int, int]] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def empty(cls, layers: int, heads: int, candidates: int, ranges: int = 1, parts: int = 0) -> Statistics:
        """All sums zero."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        sums = (zeros(ranges, layers, heads, candidates), zeros(ranges, layers, heads, candidates))
        times = (zeros(layers, len(TIMES), candidates), zeros(layers))
        return cls(*sums, zeros(ranges, layers), *times, zeros(ranges, parts))

    def mean_error(self) -> Tensor:
        """Mean over the calls of the squared relative error, fp64 `[P, L, H, C]`.

        Summed over the heads of a layer it is the squared relative error of the layer.
        """
        return self.error / self.calls.clamp(min=1)[..., None, None]

    def mean_density(self) -> Tensor:
        """Mean over the calls of the density, fp64 `[P, L, H, C]`."""
        return self.density / self.calls.clamp(min=1)[..., None, None]

    @property
    def has_times(self) -> bool:
        """Whether every layer that was seen was timed."""
        return bool((self.timings[self.calls.sum(0) > 0] > 0).all())

    def mean_time(self, hoisted: bool = False) -> tuple[Tensor, Tensor]:
        """Time of heads as a share of that of dense attention in their layer, and what each group of heads adds.

        Layers are timed by one call each and do the same work per pair, so both rest on the median over the layers: a
        layer that happened to be timed well would attract what it is not good for.

        Args:
            hoisted: without the order, which is then applied once per pass.

        Returns:
            fp64 `[P, L, H, C]`, in proportion to the densities of the heads; fp64 `[P, L, C]`. The mean of the first
            over the heads and the second make the time of a layer under one candidate.
        """
        timed = self.timings > 0
        time = self.time[timed] / self.timings[timed][:, None, None]
        whole, half = (time[:, at] if hoisted else time[:, at] + time[:, at + 1] for at in (0, 2))
        alone, density, seen = whole.quantile(0.5, 0), self.mean_density(), self.calls > 0
        group = torch.minimum((2 * half - whole).quantile(0.5, 0).clamp(min=0), alone)
        over_all = density[seen].mean((0, 1)).clamp(min=1e-12)
        return (alone - group) * density / over_all, group.expand(*self.calls.shape, -1)

    @property
    def probe(self) -> int | None:
        """The candidate that probes run: of middling error among those that are not exact; None where all are."""
        error = self.mean_error().sum(2)[self.calls > 0].mean(0)
        ranked = [int(index) for index in error.argsort() if float(error[index]) > _EXACT]
        return ranked[len(ranked) // 2] if ranked else None

    def weight(self) -> Tensor | None:
        """Mean squared change of the picture per squared relative error of a layer, fp64 `[P, L]`; None: not probed."""
        if not self.probed or self.probe is None:
            return None
        caused = self.mean_error()[..., self.probe].sum(2)
        weights = torch.zeros_like(caused)
        for part, layers in enumerate(layer_parts(caused.shape[1], self.change.shape[1])):
            change = self.change[:, part] / len({number for number, _, _ in self.probed})
            weights[:, layers] = (change / caused[:, layers].sum(1).clamp(min=1e-12))[:, None]
        return weights

    def copy(self) -> Statistics:
        """Sums that can be added to without touching these."""
        sums = {name: getattr(self, name).clone() for name in _SUMS}
        return replace(self, **sums, done=list(self.done), probed=list(self.probed))

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write to `path`, complete or not at all, with the settings that the sums belong to."""
        tensors = {name: getattr(self, name) for name in _SUMS}
        told = {"done": self.done, "probed": self.probed, "seconds": self.seconds}
        temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"format": FORMAT, "settings": settings, **told})
        save_file(tensors, temporary, metadata={"head": head})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ConfigError: not such a file, or the sums belong to other settings.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                head = json.loads((file.metadata() or {})["head"])
                sums = [file.get_tensor(name) for name in _SUMS] if head.get("format") == FORMAT else []
        except (SafetensorError, KeyError, ValueError, OSError) as fault:
            raise ConfigError(str(path), f"cannot be read as statistics of a calibration: {fault}") from None
        found = head.get("settings", {})
        wrong = sorted(key for key in {*settings, *found} if settings.get(key) != found.get(key))
        if head.get("format") != FORMAT or wrong:
            what = ", ".join(wrong) or "format"
            raise ConfigError(
                str(path), f"holds another calibration (differs in {what}); use another file or remove it"
            )
        probed = [(int(number), int(at), int(part)) for number, at, part in head["probed"]]
        named = dict(zip(_SUMS, sums, strict=True))
        return cls(**named, done=list(head["done"]), probed=probed, seconds=float(head["seconds"]))


def layer_parts(layers: int, parts: int) -> list[slice]:
    """Consecutive parts of the layers, as equal as can be; empty ones are left out."""
    bounds = [round(number * layers / parts) for number in range(parts + 1)] if parts else []
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]
