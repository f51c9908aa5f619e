"""Which of the known shapes an object in a clip has: soft masks compared with templates, all frames voting."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np

from dit_accel.samples.clips import SHAPES, outline

_SIZE = 48  # pixels of a side in which masks are compared
_SPREAD = 0.4  # side of a square of the object's area, in sides of that picture
_BLURS = (0.08, 0.25)  # of templates, in radii: edges are a pixel or two wide, corners may be rounded
_ROUND = 1.1  # by how much a rounded template must be better than a sharp one
_DETAIL = 8  # pixels of a template's drawing per pixel of the picture
SYMMETRY = {"square": 4, "triangle": 3, "star": 5, "cross": 4}  # turns that leave a shape as it is; a ball has no turn


def coverage(frame: np.ndarray, mask: np.ndarray, color: np.ndarray, background: np.ndarray) -> np.ndarray:
    """How much of each pixel is the object, in [0, 1], `[H, W]`: where between background and object its colour is.

    Args:
        frame: uint8 `[H, W, 3]`.
        mask: roughly where the object is, bool `[H, W]`; nothing further than a pixel from it counts.
        color, background: of object and background, `[3]`, or backgrounds of every pixel `[H, W, 3]`.
    """
    step = color - background
    along = ((frame - background) * step).sum(-1) / np.maximum((step * step).sum(-1), 1.0)
    near = cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8))
    return np.asarray(np.clip(along, 0, 1) * near)


def centered(cover: np.ndarray) -> np.ndarray:
    """A soft mask `[H, W]` scaled to a common area and moved to the middle, `[48, 48]`."""
    weight = cover.sum()
    rows, columns = np.indices(cover.shape)
    middle = np.array([(columns * cover).sum(), (rows * cover).sum()]) / weight
    scale = _SIZE * _SPREAD / np.sqrt(weight)
    shift = (_SIZE - 1) / 2 - scale * middle
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(cover.astype(np.float32), matrix, (_SIZE, _SIZE), flags=cv2.INTER_CUBIC))


@lru_cache
def templates(shape: str, turns: int, blur: float = _BLURS[0]) -> np.ndarray:
    """A shape in `turns` angles over its symmetry, as `centered` would make it, `[turns, 48, 48]`.

    Args:
        shape: key of `SHAPES`.
        turns: how many angles.
        blur: standard deviation in radii of the blur that rounds its corners.
    """
    period = 2 * np.pi / SYMMETRY.get(shape, 1)
    return np.stack([_template(shape, period * turn / turns, blur) for turn in range(turns)])


def _template(shape: str, angle: float, blur: float) -> np.ndarray:
    side = _SIZE * _DETAIL
    image, radius = np.zeros((side, side), np.float32), side / 4
    if shape == "ball":
        cv2.circle(image, (side // 2, side // 2), round(radius), (1.0,), -1)
    else:
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        cv2.fillPoly(image, [np.round(side / 2 + radius * outline(shape) @ turn).astype(np.int32)], (1.0,))
    blurred = cv2.GaussianBlur(image, (0, 0), blur * radius)
    # What is blurred looks rounded and not faint, as masks are soft for a pixel or two only.
    rounded = np.clip((blurred - 0.5) * max(1.0, blur / _BLURS[0]) + 0.5, 0, 1)
    return centered(cv2.resize(rounded, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA))


def match_shapes(covers: Sequence[np.ndarray], turns: int = 1) -> dict[str, np.ndarray]:
    """How unlike each shape the object is, by shape: mean absolute difference, `[frames, turns]`.

    Shapes are compared sharp and with rounded corners, over all frames alike: autoencoders round them, and a cross
    without its corners is nearer to a ball than to a sharp cross.

    Args:
        covers: its soft mask in several frames.
        turns: angles that are tried, over the symmetry of the shape; 1 tries the upright one.
    """
    seen = np.stack([centered(cover) for cover in covers])[:, None]
    found = {}
    for shape in SHAPES:
        count = 1 if shape == "ball" else turns
        sharp, rounded = (np.abs(seen - templates(shape, count, blur)).mean((2, 3)) for blur in _BLURS)
        found[shape] = min(sharp, _ROUND * rounded, key=lambda unlike: float(unlike.min(1).sum()))
    return found


def likeliest_shape(covers: Sequence[np.ndarray]) -> str:
    """The upright shape that the object is least unlike over all frames; "none" without frames."""
    if not covers:
        return "none"
    unlike = match_shapes(covers)
    return min(unlike, key=lambda shape: float(unlike[shape].sum()))
