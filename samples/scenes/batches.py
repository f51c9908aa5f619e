"""Batches of scenes and their captions, drawn by several processes; each imports this module, so it imports little."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import count
from multiprocessing import get_context

import numpy as np

from dit_accel.samples.scenes.draw import Canvas, Scene, draw_scene
from dit_accel.samples.scenes.language import caption

Batch = tuple[list[Scene], list[str]]
_AHEAD = 2  # batches per process that are drawn before they are asked for


def draw_batch(seed: int, canvas: Canvas, size: int, held_out: bool, number: int) -> Batch:
    """Batch `number` of `size` scenes with their captions, whatever was drawn before it."""
    rng = np.random.default_rng((seed, number))
    scenes = [draw_scene(rng, canvas, held_out) for _ in range(size)]
    return scenes, [caption(scene.meaning, rng) for scene in scenes]


def scene_batches(seed: int, canvas: Canvas, size: int, held_out: bool, workers: int) -> Iterator[Batch]:
    """Endless batches, the same for a seed and any number of `workers`; 0 draws here."""
    make = partial(draw_batch, seed, canvas, size, held_out)
    if workers == 0:
        yield from map(make, count())
        return
    # A forked child of a process that uses a GPU hangs.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        pending = [pool.submit(make, number) for number in range(_AHEAD * workers)]
        for number in count(len(pending)):
            pending.append(pool.submit(make, number))
            yield pending.pop(0).result()
