"""Prompts to compare on: those given, or for the small model held-out captions whose clips can be judged."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from dit_accel.compare.runner import Task
from dit_accel.errors import ConfigError
from dit_accel.presets import Preset

SMALL_MODEL = "samples/tiny-wan"
_HELD_OUT_SEED = 99


def make_tasks(preset: Preset, prompts: Sequence[str], count: int, seed: int) -> tuple[list[Task], tuple[str, ...]]:
    """The tasks, and the criteria that their judge decides (none where prompts are given).

    Args:
        preset: says the model.
        prompts: given prompts; prompt i runs with seed + i.
        count: how many held-out captions of the small model, when no prompts are given.
        seed: of the first task, and of the captions.

    Raises:
        ConfigError: no prompts for a model other than the small one.
    """
    if prompts:
        return [Task(text, seed + number) for number, text in enumerate(prompts)], ()
    if preset.repository != SMALL_MODEL:
        raise ConfigError("--prompts", f"expected at least one prompt for {preset.name}")
    from dit_accel.samples.clips import caption, draw_scene
    from dit_accel.samples.judge import CRITERIA, judge

    rng = np.random.default_rng(seed + _HELD_OUT_SEED)
    tasks = []
    for number in range(count):
        scene = draw_scene(rng, held_out=True)
        tasks.append(Task(caption(scene, rng), seed + number, partial(judge, scene=scene)))
    return tasks, CRITERIA
