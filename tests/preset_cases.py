"""Presets shrunk to what a tiny pipeline can run in two steps."""

from __future__ import annotations

from functools import cache
from typing import Any

from dit_accel.models import call_arguments
from dit_accel.presets import Preset
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline

pipeline_of = cache(tiny_pipeline)


def shrunk(preset: Preset, steps: int = 2) -> Preset:
    """The preset with `steps` steps, of which at most the first is dense, and at most one dense layer."""
    short = {"dense_steps": ((0, 1),), "dense_layers": ((0, 1),), "dense_noise": (), "min_tokens": 0}

    def cut(schedule):
        if schedule is None:
            return None
        return schedule.model_copy(update={k: v if getattr(schedule, k) else type(v)() for k, v in short.items()})

    generation = preset.generation.model_copy(update={"num_inference_steps": steps})
    schedules = {"schedule": cut(preset.schedule), "schedule_2": cut(preset.schedule_2)}
    return preset.model_copy(update={"generation": generation, **schedules})


def arguments(pipe: Any, preset: Preset, **more: Any) -> dict[str, Any]:
    """Arguments of a short call: the preset's guidance, the tiny pipeline's size and inputs."""
    steps = preset.generation.num_inference_steps
    return {**call_arguments(pipe, preset.generation), **tiny_arguments(preset.tiny, steps=steps), **more}
