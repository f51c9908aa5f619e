"""The shift of a scheduler's noise levels: what a pipeline has, what its preset asks for, and the levels it gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def _setting(config: Mapping[str, Any]) -> str | None:
    """Name of the fixed shift among a scheduler's settings; None where there is none, or where it is not used."""
    if config.get("use_dynamic_shifting"):  # follows from the length of the sequence, whatever the setting says
        return None
    if config.get("use_flow_sigmas"):  # UniPC, DPM-Solver, DEIS, SA-Solver
        return "flow_shift" if "flow_shift" in config else None
    return "shift" if "shift" in config else None  # the schedulers that know nothing but flow matching


def scheduler_shift(scheduler: Any) -> float | None:
    """The fixed shift that a Diffusers scheduler runs with; None where it has none (DDIM) or derives it from the size.

    Args:
        scheduler: of a pipeline.
    """
    name = _setting(scheduler.config)
    return None if name is None else float(scheduler.config[name])


def set_flow_shift(pipe: Any, shift: float | None) -> None:
    """Give a pipeline a scheduler of the same class and settings but this shift; one that has no such setting stays.

    Published repositories hold one scheduler file for all sizes, though publishers shift small videos less.

    Args:
        pipe: a Diffusers pipeline.
        shift: s of the levels s u / (1 + (s - 1) u). None: leave the scheduler as it is.
    """
    scheduler = getattr(pipe, "scheduler", None)
    if shift is None or scheduler is None:
        return
    name = _setting(scheduler.config)
    if name is None or scheduler.config[name] == shift:
        return
    pipe.scheduler = type(scheduler).from_config(scheduler.config, **{name: shift})


def noise_levels(steps: int, flow_shift: float | None) -> list[float]:
    """Noise level in (0, 1] at the start of every step.

    Args:
        steps: of the denoising loop.
        flow_shift: shift of the levels. None: they fall evenly.
    """
    shift = 1.0 if flow_shift is None else flow_shift
    even = [1 - step / steps for step in range(steps)]
    return [shift * level / (1 + (shift - 1) * level) for level in even]
