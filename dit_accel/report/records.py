"""What was really computed: one record per attention call, summed up for people and for JSON."""

from __future__ import annotations

import json
import os
import platform
import sys
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

from dit_accel.report.plan_picture import PlanPicture

PHASES = ("order", "select", "attend", "guard")
"""The timed parts of a call: put tokens in order, choose blocks, compute, and check a sample of rows."""


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
        level: how many times the guard had raised the density of this layer and branch.
        measures: what the method says of its choice, and "overlap" with the plan it replaces; numbers or 0-d tensors.
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
    level: int = 0
    measures: dict[str, Any] = field(default_factory=dict)
    _density: float | Tensor = 1.0
    _error: tuple[float, float] | Tensor | None = None
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

    @property
    def error(self) -> tuple[float, float] | None:
        """Estimate and upper bound of the call's relative error; None where it was not measured. May synchronise."""
        if isinstance(self._error, Tensor):
            estimate, bound = self._error.tolist()
            self._error = (estimate, bound)
        return self._error

    @error.setter
    def error(self, value: tuple[float, float] | Tensor | None) -> None:
        self._error = value

    def milliseconds(self, phase: str) -> float:
        """Time of one of `PHASES` in ms; 0 where the phase did not run."""
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

    def adopt(self, phase: str, other: CallRecord) -> None:
        """Count what `other` has timed, and will, of a phase as part of this call; the phase must not have run here."""
        self._marks[phase] = other._marks.setdefault(phase, [])

    def to_dict(self) -> dict[str, Any]:
        """Plain values; the error stands only where it was measured."""
        error = {} if self.error is None else {"error": _short(self.error[0]), "error_bound": _short(self.error[1])}
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
            "level": self.level,
            **error,
            **({"measures": {k: round(float(v), 6) for k, v in self.measures.items()}} if self.measures else {}),
            **{f"{phase}_ms": round(self.milliseconds(phase), 4) for phase in PHASES},
        }


class Report:
    """All attention calls of the latest generation.

    Args:
        calls: the records.
        settings: what was asked for: preset, method, parameters, schedule, backend.
        pictures: what the plans look like, one per layer.
    """

    def __init__(
        self, calls: Iterable[CallRecord], settings: dict[str, Any], pictures: Iterable[PlanPicture] = ()
    ) -> None:
        self.calls = list(calls)
        self.settings = settings
        self.pictures = list(pictures)

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
        """Seconds spent in each of `PHASES`, over all calls."""
        return {phase: sum(c.milliseconds(phase) for c in self.calls) / 1e3 for phase in PHASES}

    @property
    def worst_error(self) -> tuple[float, float] | None:
        """Largest estimate and largest bound over the calls where the error was measured; None without any."""
        errors = [c.error for c in self.calls if c.error is not None]
        return (max(e for e, _ in errors), max(b for _, b in errors)) if errors else None

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
        if self.worst_error is not None:
            estimate, bound = self.worst_error
            lines.append(f"relative error of a call: at most {estimate:.3f} estimated, bound {bound:.3f}")
        lines.append("seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in self.seconds.items() if s > 0))
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
            "peak_memory_mib": peak_memory(),
            "dense_reasons": self.dense_reasons,
            "calls": [c.to_dict() for c in self.calls],
            "pictures": [p.to_dict() for p in self.pictures],
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict()` as JSON, under a temporary name that is renamed when complete."""
        temporary = f"{path}.tmp"
        Path(temporary).write_text(json.dumps(self.to_dict(), indent=1), encoding="utf-8")
        os.replace(temporary, path)


def _reason_group(reason: str) -> str:
    """Reasons that differ only in the layer, step or figures they name count as one in the summary."""
    if reason.startswith("guard: "):
        return reason.split(";")[0]
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


def peak_memory() -> dict[str, float]:
    """Largest memory in MiB since the process began: of the process, and of PyTorch's allocator on each CUDA device."""
    try:
        import resource

        # Linux counts in KiB, macOS in bytes.
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peaks = {"process": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)}
    except ImportError:  # there is no such module on Windows
        peaks = {}
    for index in range(torch.cuda.device_count()):
        peaks[f"cuda:{index}"] = round(torch.cuda.max_memory_allocated(index) / 2**20, 1)
    return peaks


def _short(value: float) -> float:
    """Six significant digits, so that small errors survive."""
    return float(f"{value:.6g}")


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
