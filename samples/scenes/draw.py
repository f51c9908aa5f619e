"""Scenes of the full repertoire, drawn from seeds: a meaning and the numbers that no caption says. Units are pixels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from dit_accel.samples.clips import BACKGROUNDS, COLORS, DEFAULT_BACKGROUND, DIRECTIONS, JITTER, SHAPES
from dit_accel.samples.scenes.meaning import (
    AXES,
    BOUNCES,
    CHANGES,
    PACES,
    SIZES,
    STRAIGHT,
    TEXTURES,
    Backdrop,
    Meaning,
    Thing,
    is_held_out,
)

RADIUS = {"small": (5.5, 7.0), None: (8.5, 10.5), "large": (12.0, 14.0)}
SPEED = {"slow": (0.22, 0.34), None: (0.5, 0.68), "fast": (0.92, 1.08)}  # per frame
BOUNCE_SPEED = (1.25, 1.5)
SLIDE = (0.45, 0.6)  # of drifting backdrops and panning cameras, per frame
PERIOD = (13.0, 17.0)  # of textures
TURN = (0.09, 0.13)  # of what spins, radians per frame
GROWTH = (0.6, 1.35)  # radius at the start and at the end of what grows, as shares of the usual
_TRIES = 16  # placements of two things, of which the first that keeps them apart is taken, or the best
_APART = 1.2  # distance of two things that counts as apart, in sums of their radii


@dataclass(frozen=True)
class Canvas:
    """Size of a clip.

    Args:
        frames, height, width: pixels.
        endless: whether things may go on for ever: the edges throw everything back, nothing grows, no camera pans.
    """

    frames: int
    height: int
    width: int
    endless: bool = False


@dataclass(frozen=True)
class Body:
    """Where one thing is: on the screen, camera included.

    Args:
        start: (x, y) of its centre in the first frame.
        velocity: (x, y) per frame.
        radius: in the first and in the last frame.
        turn: radians per frame, clockwise.
        bounces: whether the edges throw it back.
    """

    start: tuple[float, float]
    velocity: tuple[float, float]
    radius: tuple[float, float]
    turn: float = 0.0
    bounces: bool = False

    def centers(self, canvas: Canvas) -> np.ndarray:
        """(x, y) in every frame, `[frames, 2]`."""
        way = np.array(self.start) + np.arange(canvas.frames)[:, None] * np.array(self.velocity)
        if not self.bounces:
            return way
        edge = max(self.radius)
        room = np.maximum(np.array([canvas.width, canvas.height]) - 2 * edge, 1.0)
        return np.asarray(edge + room - np.abs((way - edge) % (2 * room) - room))

    def radii(self, frames: int) -> np.ndarray:
        """In every frame, `[frames]`."""
        return np.linspace(*self.radius, frames)


@dataclass(frozen=True)
class Scene:
    """A meaning and its numbers.

    Args:
        meaning: what a caption says.
        bodies: one per thing.
        period: of the texture.
        phase: (x, y) of the texture in the first frame.
        slide: (x, y) by which the texture moves per frame.
        is_upright: whether stripes are.
    """

    meaning: Meaning
    bodies: tuple[Body, ...]
    period: float
    phase: tuple[float, float]
    slide: tuple[float, float]
    is_upright: bool


def draw_scene(rng: np.random.Generator, canvas: Canvas, held_out: bool = False) -> Scene:
    """Draw a scene at random; all its things are of training combinations, or all of held-out ones."""
    return stage(draw_meaning(rng, held_out, canvas.endless), rng, canvas)


def stage(meaning: Meaning, rng: np.random.Generator, canvas: Canvas) -> Scene:
    """Draw the numbers of a scene that means `meaning`."""
    speed = float(rng.uniform(*SLIDE))
    slide = speed * _unit(meaning.backdrop.drift) - speed * _unit(meaning.camera)
    pan = -speed * _unit(meaning.camera)
    choices = [_place(rng, meaning, canvas, pan)]
    while len(meaning.things) == 2 and _gap(choices[-1], canvas) < _APART and len(choices) < _TRIES:
        choices.append(_place(rng, meaning, canvas, pan))
    bodies = max(choices, key=lambda bodies: _gap(bodies, canvas))
    period = float(rng.uniform(*PERIOD))
    phase = (float(rng.uniform(0, period)), float(rng.uniform(0, period)))
    is_upright = bool(slide[0]) or (not slide[1] and rng.random() < 0.5)
    return Scene(meaning, bodies, period, phase, (float(slide[0]), float(slide[1])), is_upright)


def draw_meaning(rng: np.random.Generator, held_out: bool = False, endless: bool = False) -> Meaning:
    """Draw what a caption is to say."""
    backdrop = _draw_backdrop(rng)
    pans = not endless and backdrop.texture is not None and backdrop.drift is None and rng.random() < 0.4
    camera = _choose(rng, AXES) if pans else None
    count = 2 if rng.random() < 0.35 else 1
    while True:
        things = tuple(_draw_thing(rng, held_out, endless, camera is not None, count == 2) for _ in range(count))
        first, last = things[0], things[-1]
        if count == 1 or (first.color != last.color and first.shape != last.shape):
            return Meaning(things, backdrop, camera)


def _draw_thing(rng: np.random.Generator, held_out: bool, endless: bool, pans: bool, is_one_of_two: bool) -> Thing:
    kind = rng.random()
    motions = tuple(STRAIGHT) if kind < 0.75 else ("rest",) if kind > 0.9 or pans else tuple(BOUNCES)
    while True:
        thing = Thing(_choose(rng, COLORS), _choose(rng, SHAPES), _choose(rng, motions))
        if is_held_out(thing) == held_out:
            break
    changes = [name for name in CHANGES if name == "spinning" or not endless]
    changes = [name for name in changes if name != "spinning" or thing.shape != "ball"]
    change = _choose(rng, changes) if changes and rng.random() < 0.3 else None
    sizes = [name for name in SIZES if name == "small" or not is_one_of_two]
    size = _choose(rng, sizes) if change in (None, "spinning") and rng.random() < 0.4 else None
    pace = _choose(rng, PACES) if thing.motion in STRAIGHT and rng.random() < 0.4 else None
    return Thing(thing.color, thing.shape, thing.motion, size, change, pace)


def _draw_backdrop(rng: np.random.Generator) -> Backdrop:
    color = DEFAULT_BACKGROUND if rng.random() < 0.25 else _choose(rng, BACKGROUNDS)
    if rng.random() < 0.55:
        return Backdrop(color)
    return Backdrop(color, _choose(rng, TEXTURES), _choose(rng, AXES) if rng.random() < 0.35 else None)


def _place(rng: np.random.Generator, meaning: Meaning, canvas: Canvas, pan: np.ndarray) -> tuple[Body, ...]:
    """Bodies of the things: one near the middle, two on either side of it."""
    size = np.array([canvas.width, canvas.height])
    angle, away = rng.uniform(0, 2 * np.pi), len(meaning.things) - 1
    side = away * 0.24 * size * np.array([np.cos(angle), np.sin(angle)])
    return tuple(
        _body(rng, thing, canvas, pan, size / 2 + sign * side + rng.uniform(-JITTER, JITTER, 2))
        for thing, sign in zip(meaning.things, (1, -1), strict=False)
    )


def _body(rng: np.random.Generator, thing: Thing, canvas: Canvas, pan: np.ndarray, wanted: np.ndarray) -> Body:
    radius = float(rng.uniform(*RADIUS[thing.size]))
    begin, end = {"growing": GROWTH, "shrinking": GROWTH[::-1]}.get(thing.change or "", (1.0, 1.0))
    sign = float(rng.choice((-1, 1)))
    turn = sign * float(rng.uniform(*TURN)) if thing.change == "spinning" else 0.0
    if thing.motion in BOUNCES:
        axis = np.array([1.0, 0.0] if thing.motion == "sideways" else [0.0, 1.0])
        size = np.array([canvas.width, canvas.height])
        # From near the middle towards the nearer edge: a clip in which it does not come back shows no bounce.
        wanted = np.where(axis > 0, np.clip(wanted, 0.35 * size, 0.65 * size), wanted)
        velocity = rng.uniform(*BOUNCE_SPEED) * axis * np.where(wanted < size / 2, -1, 1)
    else:
        way = _unit(thing.motion) if thing.motion in STRAIGHT else np.zeros(2)
        velocity = rng.uniform(*SPEED[thing.pace]) * way + pan
    bounces, edge = canvas.endless or thing.motion in BOUNCES, radius * max(begin, end)
    travel = np.zeros(2) if bounces else velocity * (canvas.frames - 1)
    start = _fit(wanted, travel, edge, np.array([canvas.width, canvas.height]))
    return Body(_pair(start), _pair(velocity), (radius * begin, radius * end), turn, bounces)


def _fit(wanted: np.ndarray, travel: np.ndarray, edge: float, size: np.ndarray) -> np.ndarray:
    """The start closest to `wanted` from which a path stays `edge` off the edges; in between where none does."""
    low, high = np.maximum(edge, edge - travel), np.minimum(size, size - travel) - edge
    return np.where(high > low, np.clip(wanted, low, high), (low + high) / 2)


def _gap(bodies: tuple[Body, ...], canvas: Canvas) -> float:
    """Smallest distance of two bodies over the clip, in sums of their radii; infinite for one body."""
    if len(bodies) == 1:
        return float("inf")
    first, second = (body.centers(canvas) for body in bodies)
    reach = sum(body.radii(canvas.frames) for body in bodies)
    return float((np.linalg.norm(first - second, axis=1) / reach).min())


def _unit(direction: str | None) -> np.ndarray:
    """(x, y) of length 1, or 0 for no direction."""
    way = np.array(DIRECTIONS[direction][0] if direction else (0, 0), dtype=float)
    return np.asarray(way / max(1.0, float(np.hypot(*way))))


def _pair(values: np.ndarray) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _choose(rng: np.random.Generator, names: Iterable[str]) -> str:
    return str(rng.choice(list(names)))
