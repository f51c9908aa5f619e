"""What calibration keeps: a few sums per layer, head and candidate, in a file that a killed run resumes from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.errors import ConfigError

FORMAT = "dit_accel.calibration/2"

_SUMS = ("error", "density", "calls", "time", "timings")


@dataclass
class Statistics:
    """Sums over the calls seen, fp64 on the CPU.

    Args:
        error: squared error of a head under a candidate, relative to the squared output of all heads of its layer,
            `[layers, heads, candidates]`.
        density: share of pairs that the candidate computed, `[layers, heads, candidates]`.
        calls: calls seen, `[layers]`.
        time: time of the layer under a candidate, as a share of that of dense attention, `[layers, candidates]`.
            Default: zeros.
        timings: calls that were timed, `[layers]`. Default: none.
        done: prompts that are in the sums.
        seconds: time that they took.
    """

    error: Tensor
    density: Tensor
    calls: Tensor
    time: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    timings: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    done: list[int] = field(default_factory=list)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if not self.timings.numel():
            layers, _, candidates = self.error.shape
            self.time = torch.zeros(layers, candidates, dtype=torch.float64)
            self.timings = torch.zeros(layers, dtype=torch.float64)

    @classmethod
    def empty(cls, layers: int, heads: int, candidates: int) -> Statistics:
        """All sums zero."""
        sums = torch.zeros(layers, heads, candidates, dtype=torch.float64)
        return cls(sums, sums.clone(), torch.zeros(layers, dtype=torch.float64))

    def mean_error(self) -> Tensor:
        """Mean over the calls of the squared relative error, fp64 `[layers, heads, candidates]`.

        Summed over the heads of a layer it is the squared relative error of the layer.
        """
        return self.error / self.calls.clamp(min=1)[:, None, None]

    def mean_density(self) -> Tensor:
        """Mean over the calls of the density, fp64 `[layers, heads, candidates]`."""
        return self.density / self.calls.clamp(min=1)[:, None, None]

    def mean_time(self) -> Tensor:
        """Time of a head as a share of dense attention's, fp64 `[layers, heads, candidates]`.

        That of the layer, which is what was timed, in proportion to the densities of its heads.
        """
        time = self.time / self.timings.clamp(min=1)[:, None]
        density = self.mean_density()
        return time[:, None] * density / density.mean(1, keepdim=True).clamp(min=1e-12)

    def copy(self) -> Statistics:
        """Sums that can be added to without touching these."""
        sums = {name: getattr(self, name).clone() for name in _SUMS}
        return replace(self, **sums, done=list(self.done))

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write to `path`, complete or not at all, with the settings that the sums belong to."""
        tensors = {name: getattr(self, name) for name in _SUMS}
        head = {"format": FORMAT, "settings": settings, "done": self.done, "seconds": self.seconds}
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"head": json.dumps(head)})
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
        error, density, calls, time, timings = sums
        return cls(error, density, calls, time, timings, list(head["done"]), float(head["seconds"]))
