"""Prompts to calibrate on: those given, or for the small model captions that are not held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dit_accel.compare.tasks import SMALL_MODEL
from dit_accel.errors import ConfigError
from dit_accel.presets import Preset


def calibration_prompts(preset: Preset, prompts: Sequence[str], count: int, seed: int) -> tuple[str, ...]:
    """The prompts.

    Args:
        preset: says the model.
        prompts: given ones.
        count: how many captions of the small model when none are given; never those that comparisons hold out.
        seed: of the captions.

    Raises:
        ConfigError: no prompts for a model other than the small one.
    """
    if prompts:
        return tuple(prompts)
    if preset.repository != SMALL_MODEL:
        raise ConfigError("--prompts", f"expected at least one prompt for {preset.name}")
    from dit_accel.samples.clips import caption, draw_scene

    rng = np.random.default_rng(seed)
    return tuple(caption(draw_scene(rng, held_out=False), rng) for _ in range(count))
