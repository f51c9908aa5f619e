"""What a clip of the basic repertoire shows, found with OpenCV: one object on a plain background."""

from __future__ import annotations

import cv2
import numpy as np

from dit_accel.samples.clips import BACKGROUNDS, COLORS, DIRECTIONS, Scene
from dit_accel.samples.shape_matching import coverage, likeliest_shape

CRITERIA = ("color", "shape", "direction", "background")
_MARGIN = 40  # a pixel belongs to the object when some channel is this far from the background
_SMALLEST = 20  # pixels of an object


def find_object(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Bool mask `[H, W]` of the largest connected region that differs from the background colour."""
    differs = (np.abs(frame.astype(int) - background).max(-1) > _MARGIN).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(differs)
    if count < 2:
        return np.zeros(frame.shape[:2], dtype=bool)
    return np.asarray(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def nearest(color: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    """Name of the closest colour of a table."""
    return min(table, key=lambda name: float(np.linalg.norm(color - np.array(table[name]))))


def describe(clip: np.ndarray) -> dict[str, str]:
    """What a clip (uint8 `[T, H, W, 3]`) shows, by criterion; "none" where no object is found in two frames."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    background = np.median(border, axis=0)
    masks = [find_object(frame, background) for frame in clip]
    seen = [i for i, mask in enumerate(masks) if mask.sum() >= _SMALLEST]
    found = dict.fromkeys(CRITERIA, "none") | {"background": nearest(background, BACKGROUNDS)}
    if len(seen) < 2:
        return found
    color = np.median(np.concatenate([clip[i][_core(masks[i])] for i in seen]), axis=0)
    found["color"] = nearest(color, COLORS)
    whole = [i for i in seen if not _touches_edge(masks[i])] or seen
    found["shape"] = likeliest_shape([coverage(clip[i], masks[i], color, background) for i in whole])
    centers = np.array([np.argwhere(masks[i]).mean(0)[::-1] for i in seen])
    found["direction"] = _direction(np.polyfit(seen, centers, 1)[0] * (seen[-1] - seen[0]))
    return found


def _core(mask: np.ndarray) -> np.ndarray:
    """The mask without its border, or the mask where nothing else is left."""
    inside = cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    return np.asarray(inside if inside.any() else mask)


def _touches_edge(mask: np.ndarray) -> bool:
    return bool(mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())


def judge(clip: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which criteria a clip (uint8 `[T, H, W, 3]`) meets."""
    return {name: found == getattr(scene, name) for name, found in describe(clip).items()}


def _direction(path: np.ndarray) -> str:
    """Direction of the table closest in angle to a path (x, y) in pixels."""
    if np.linalg.norm(path) < 3:
        return "none"
    unit = {name: np.array(way) / np.linalg.norm(way) for name, (way, _) in DIRECTIONS.items()}
    return max(unit, key=lambda name: float(unit[name] @ path))
