"""Procedurally drawn, captioned clips: a shape of some colour moves in some direction over a plain background.

Everything is drawn from a seed. Sizes are in pixels and do not grow with the canvas, so that a model trained on small
canvases sees the same objects on large ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

COLORS = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 85, 230),
    "yellow": (240, 215, 45),
    "orange": (245, 140, 30),
    "purple": (150, 60, 200),
    "pink": (245, 130, 185),
    "cyan": (50, 205, 215),
}
BACKGROUNDS = {
    "black": (12, 12, 12),
    "white": (240, 240, 240),
    "gray": (125, 125, 125),
    "navy": (20, 25, 75),
    "beige": (215, 195, 160),
}
SHAPES = {
    "ball": ("ball", "circle", "disc"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "cross": ("cross", "plus"),
}
DIRECTIONS = {
    "right": ((1, 0), ("right", "to the right", "rightwards")),
    "left": ((-1, 0), ("left", "to the left", "leftwards")),
    "down": ((0, 1), ("down", "downwards")),
    "up": ((0, -1), ("up", "upwards")),
    "down right": ((1, 1), ("down right", "diagonally down to the right")),
    "up right": ((1, -1), ("up right", "diagonally up to the right")),
    "down left": ((-1, 1), ("down left", "diagonally down to the left")),
    "up left": ((-1, -1), ("up left", "diagonally up to the left")),
}
VERBS = ("moving", "sliding", "gliding", "going")
DEFAULT_BACKGROUND = "black"
RADIUS = (9.0, 12.0)
SPEED = (0.55, 0.75)  # pixels per frame
JITTER = 4.0  # pixels between the start of a path and the middle of the canvas, at most, along each axis
_SUBPIXEL = 4  # fractional bits of OpenCV's drawing coordinates


@dataclass(frozen=True)
class Scene:
    """What a clip shows.

    Args:
        color, shape, direction, background: keys of the tables above.
        radius: pixels.
        speed: pixels per frame.
        place: two numbers in [-1, 1], where the path starts, in units of `JITTER` from the canvas's middle.
    """

    color: str
    shape: str
    direction: str
    background: str
    radius: float
    speed: float
    place: tuple[float, float]


def is_held_out(color: str, shape: str, direction: str) -> bool:
    """One combination in eight of colour, shape and direction is never drawn for training."""
    index = (list(COLORS).index(color), list(SHAPES).index(shape), list(DIRECTIONS).index(direction))
    return (index[0] + 3 * index[1] + 5 * index[2]) % 8 == 7


def draw_scene(rng: np.random.Generator, held_out: bool = False) -> Scene:
    """Draw a scene at random, from the training combinations or from those held out."""
    while True:
        color, shape, direction = (str(rng.choice(list(table))) for table in (COLORS, SHAPES, DIRECTIONS))
        if is_held_out(color, shape, direction) == held_out:
            break
    background = DEFAULT_BACKGROUND if rng.random() < 0.3 else str(rng.choice(list(BACKGROUNDS)))
    place = (float(rng.uniform(-1, 1)), float(rng.uniform(-1, 1)))
    return Scene(color, shape, direction, background, rng.uniform(*RADIUS), rng.uniform(*SPEED), place)


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of several phrasings; the default background may go unnamed."""
    verb, shape = str(rng.choice(VERBS)), str(rng.choice(SHAPES[scene.shape]))
    text = f"{scene.color} {shape} {verb} {rng.choice(DIRECTIONS[scene.direction][1])}"
    if scene.background != DEFAULT_BACKGROUND or rng.random() < 0.5:
        text += f" on a {scene.background} background"
    return f"an {text}" if scene.color == "orange" else f"a {text}"


def render(scene: Scene, frames: int, height: int, width: int, bounces: bool = False) -> np.ndarray:
    """Draw the clip: uint8 `[frames, height, width, 3]`, RGB. The object stays on the canvas where its path fits.

    With `bounces` it starts near the middle however long the clip is, and the edges of the canvas throw it back.
    """
    clip = np.empty((frames, height, width, 3), dtype=np.uint8)
    clip[:] = BACKGROUNDS[scene.background]
    for image, center in zip(clip, _path(scene, frames, height, width, bounces), strict=True):
        _draw_shape(image, scene.shape, center, scene.radius, COLORS[scene.color])
    return clip


def render_mask(scene: Scene, frames: int, height: int, width: int, bounces: bool = False) -> np.ndarray:
    """Where the object of the clip is: bool `[frames, height, width]`."""
    mask = np.zeros((frames, height, width, 3), dtype=np.uint8)
    for image, center in zip(mask, _path(scene, frames, height, width, bounces), strict=True):
        _draw_shape(image, scene.shape, center, scene.radius, (255, 255, 255))
    return np.asarray(mask[..., 0] > 0)


def _path(scene: Scene, frames: int, height: int, width: int, bounces: bool) -> np.ndarray:
    """Centres (x, y) of the object, `[frames, 2]`: a straight way from about the middle of the canvas outwards.

    The direction alone then says on which side the object is in later frames. Were the path to cross the middle, only
    direction, side and time together would say anything, which a small model does not find out.
    """
    (dx, dy), _ = DIRECTIONS[scene.direction]
    step = np.array([dx, dy]) / np.hypot(dx, dy) * scene.speed
    travel = step * (frames - 1)
    canvas = np.array([width, height])
    wanted = canvas / 2 + JITTER * np.array(scene.place)
    if bounces:
        room = np.maximum(canvas - 2 * scene.radius, 1.0)
        way = np.clip(wanted - scene.radius, 0, room) + np.arange(frames)[:, None] * step
        return np.asarray(scene.radius + room - np.abs(way % (2 * room) - room))
    low, high = np.maximum(scene.radius, scene.radius - travel), np.minimum(canvas, canvas - travel) - scene.radius
    start = np.where(high > low, np.clip(wanted, low, high), (low + high) / 2)
    return np.asarray(start + np.arange(frames)[:, None] * step)


def _draw_shape(image: np.ndarray, shape: str, center: np.ndarray, radius: float, color: tuple[int, int, int]) -> None:
    scale = 1 << _SUBPIXEL
    if shape == "ball":
        x, y = (round(float(c) * scale) for c in center)
        cv2.circle(image, (x, y), round(radius * scale), color, -1, cv2.LINE_AA, _SUBPIXEL)
        return
    points = np.round((center + radius * outline(shape)) * scale).astype(np.int32)
    cv2.fillPoly(image, [points], color, cv2.LINE_AA, _SUBPIXEL)


def outline(shape: str) -> np.ndarray:
    """Corners of a shape of radius 1, `[n, 2]`."""
    if shape == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.85
    if shape == "cross":
        a, b = 1.0, 0.36
        corners = [[-b, -a], [b, -a], [b, -b], [a, -b], [a, b], [b, b], [b, a], [-b, a], [-b, b], [-a, b], [-a, -b]]
        return np.array([*corners, [-b, -b]])
    count = 3 if shape == "triangle" else 10
    angle = np.arange(count) / count * 2 * np.pi - np.pi / 2
    length = np.where(np.arange(count) % 2 == 1, 0.42, 1.0) if shape == "star" else np.ones(count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=-1) * length[:, None] * 1.15


def captioned_clips(
    seed: int, frames: int, height: int, width: int, held_out: bool = False, bounces: bool = False
) -> Iterator[tuple[np.ndarray, str, np.ndarray]]:
    """Endless (clip uint8 `[frames, height, width, 3]`, caption, object mask), the same for the same seed."""
    size = (frames, height, width, bounces)
    rng = np.random.default_rng(seed)
    while True:
        scene = draw_scene(rng, held_out)
        yield render(scene, *size), caption(scene, rng), render_mask(scene, *size)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    words = {"a", "an", "on", "background", *COLORS, *BACKGROUNDS, *VERBS}
    for names in [*SHAPES.values(), *(phrases for _, phrases in DIRECTIONS.values())]:
        words.update(word for name in names for word in name.split())
    return sorted(words)
