"""Prompts that no model was trained on, each with the judge of what is made of it and the clip that would be right."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from dit_accel.samples import clips, judge
from dit_accel.samples.repertoire import BASIC, Repertoire, to_frames
from dit_accel.samples.scenes import draw, language
from dit_accel.samples.scenes import judge as scenes_judge
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.scenes.render import render_scenes

Verdict = Mapping[str, "bool | None"]


@dataclass(frozen=True)
class Task:
    """One prompt.

    Args:
        text: the prompt.
        color, shape: of its object, or of both, as `scenes.judge.name_things` puts them.
        judge: which criteria a clip (uint8 `[T, H, W, 3]`) meets; None where the prompt says nothing to judge.
        truth: draws a clip that meets all.
    """

    text: str
    color: str
    shape: str
    judge: Callable[[np.ndarray], Verdict]
    truth: Callable[[], np.ndarray]


def held_out_tasks(repertoire: Repertoire, count: int, canvas: Canvas, seed: int) -> list[Task]:
    """`count` prompts of combinations that were held out of training, the same for a seed.

    Args:
        repertoire: of the model.
        count: how many.
        canvas: size of the clips.
        seed: of the prompts.
    """
    rng = np.random.default_rng(seed)
    make = _basic_task if repertoire == BASIC else _full_task
    return [make(rng, canvas) for _ in range(count)]


def criteria(repertoire: Repertoire) -> tuple[str, ...]:
    """What is judged of a repertoire's clips."""
    return judge.CRITERIA if repertoire == BASIC else scenes_judge.CRITERIA


def _basic_task(rng: np.random.Generator, canvas: Canvas) -> Task:
    scene = clips.draw_scene(rng, held_out=True)
    truth = partial(clips.render, scene, canvas.frames, canvas.height, canvas.width, canvas.endless)
    return Task(clips.caption(scene, rng), scene.color, scene.shape, partial(judge.judge, scene=scene), truth)


def _full_task(rng: np.random.Generator, canvas: Canvas) -> Task:
    scene = draw.draw_scene(rng, canvas, held_out=True)
    names = scenes_judge.name_things([(thing.color, thing.shape) for thing in scene.meaning.things])
    judged = partial(scenes_judge.judge, meaning=scene.meaning)
    truth = partial(_drawn, scene, canvas)
    return Task(language.caption(scene.meaning, rng), judge=judged, truth=truth, **names)


def _drawn(scene: draw.Scene, canvas: Canvas) -> np.ndarray:
    return to_frames(render_scenes([scene], canvas)[0][0])
