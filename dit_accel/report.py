"""What was really computed: one record per attention call, summed up for people and for JSON."""

from __future__ import annotations

import json
import os
import platform
import time
from collections import Counter
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PHASES = ("order", "select", "attend")


@dataclass
class CallRecord:
    """One attention call.

    Args:
        component: which transformer of the pipeline ("transformer", "transformer_2").
        layer: index of the layer in that transformer.
        step: denoising step.
        branch: guidance branch.
        generation: which generation since `accelerate()`.
        method: the method asked for.
        requested: the density asked for, where the method takes one.
        reason: why the call ran dense; None when the method ran.
        backend: backend of `block_attention`, or "dense".
    """

    component: str
    layer: int
    step: int
    branch: str
    generation: int
    method: str
    requested: float | None
    reason: str | None = None
    backend: str = "dense"
    _density: float | Tensor = 1.0
    _marks: dict[str, list[Any]] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of token pairs computed. Reading it may synchronise with the device."""
        if isinstance(self._density, Tensor):
            self._density = float(self._density.mean())
        return self._density

    @density.setter
    def density(self, value: float | Tensor) -> None:
        self._density = value

    def milliseconds(self, phase: str) -> float:
        """Time of "order", "select" or "attend" in ms; 0 where the phase did not run."""
        marks = self._marks.get(phase, [])
        for index, mark in enumerate(marks):
            if isinstance(mark, tuple):
                start, end = mark
                end.synchronize()
                marks[index] = float(start.elapsed_time(end))
        return float(sum(marks))

    @contextmanager
    def timed(self, phase: str, device: torch.device) -> Any:
        """Time a phase, which may come in parts: the clock on the CPU, pairs of events (no synchronisation) on CUDA."""
        marks = self._marks.setdefault(phase, [])
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            marks.append((start, end))
        else:
            begun = time.perf_counter()
            yield
            marks.append((time.perf_counter() - begun) * 1e3)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "component": self.component,
            "layer": self.layer,
            "step": self.step,
            "branch": self.branch,
            "generation": self.generation,
            "method": self.method,
            "requested_density": self.requested,
            "density": round(self.density, 6),
            "backend": self.backend,
            "reason": self.reason,
            **{f"{phase}_ms": round(self.milliseconds(phase), 4) for phase in _PHASES},
        }


class Report:
    """All attention calls of the latest generation.

    Args:
        calls: the records.
        settings: what was asked for: preset, method, parameters, schedule, backend.
    """

    def __init__(self, calls: Iterable[CallRecord], settings: dict[str, Any]) -> None:
        self.calls = list(calls)
        self.settings = settings

    @property
    def density(self) -> float:
        """Realised density over the whole run, dense calls included; 1.0 before the first call."""
        return sum(c.density for c in self.calls) / len(self.calls) if self.calls else 1.0

    @property
    def sparse_density(self) -> float | None:
        """Realised density over the calls that the method computed; None when there was none."""
        sparse = [c.density for c in self.calls if c.reason is None]
        return sum(sparse) / len(sparse) if sparse else None

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent in order, select and attend, over all calls."""
        return {phase: sum(c.milliseconds(phase) for c in self.calls) / 1e3 for phase in _PHASES}

    @property
    def dense_reasons(self) -> dict[str, int]:
        """Why calls ran dense, and how many for each reason."""
        return dict(Counter(c.reason for c in self.calls if c.reason is not None))

    def summary(self) -> str:
        """A few lines for people."""
        sparse = [c for c in self.calls if c.reason is None]
        lines = [f"{len(self.calls)} attention calls, {len(sparse)} by {self.settings.get('method', 'dense')}"]
        if sparse:
            lines.append(f"density {self.sparse_density:.3f} in those calls, {self.density:.3f} over the whole run")
            lines.append(f"backend {', '.join(sorted({c.backend for c in sparse}))}")
        lines.append("seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items()))
        groups: Counter[str] = Counter(_reason_group(c.reason) for c in self.calls if c.reason is not None)
        lines += [f"dense x {n}: {reason}" for reason, n in groups.most_common()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: settings, environment, totals, and one row per call."""
        return {
            "settings": self.settings,
            "environment": environment(),
            "density": self.density,
            "sparse_density": self.sparse_density,
            "seconds": self.seconds,
            "dense_reasons": self.dense_reasons,
            "calls": [c.to_dict() for c in self.calls],
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, under a temporary name that is renamed when complete."""
        temporary = f"{path}.tmp"
        Path(temporary).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(temporary, path)


def _reason_group(reason: str) -> str:
    """Reasons that differ only in the layer or step they name count as one in the summary."""
    words = reason.split()
    return " ".join(["each", *words[2:]]) if words[0] in ("step", "layer", "noise") else reason


def environment() -> dict[str, str]:
    """Versions and hardware that a figure depends on."""
    versions = {}
    for package in ("dit_accel", "torch", "diffusers", "transformers", "triton", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {"python": platform.python_version(), **versions, "device": device, "threads": str(torch.get_num_threads())}


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
