"""The clips of all candidates side by side, labelled, in one video."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cv2
import numpy as np

from dit_accel.video.files import to_uint8

_LEAST_WIDTH = 192
_BAND = 22


def side_by_side(clips: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """One clip, uint8 `[T, H', W', 3]`: a nearly square grid of the clips, each under its label.

    Args:
        clips: label and frames `[T, H, W, 3]` (float in [0, 1] or uint8); all of one shape. Small ones are enlarged.
    """
    columns = math.ceil(math.sqrt(len(clips)))
    tiles = [_labelled(label, to_uint8(frames)) for label, frames in clips]
    blank = np.zeros_like(tiles[0])
    tiles += [blank] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[i : i + columns], axis=2) for i in range(0, len(tiles), columns)]
    return np.concatenate(rows, axis=1)


def _labelled(label: str, frames: np.ndarray) -> np.ndarray:
    """Frames enlarged by a whole number, under a band with the label."""
    factor = max(1, math.ceil(_LEAST_WIDTH / frames.shape[2]))
    large = frames.repeat(factor, axis=1).repeat(factor, axis=2)
    band = np.zeros((_BAND, large.shape[2], 3), dtype=np.uint8)
    room = large.shape[2] // 7  # width of a letter at this size
    text = label if len(label) <= room else label[: room - 2] + ".."
    cv2.putText(band, text, (3, 15), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (255, 255, 255), 1, cv2.LINE_AA)
    return np.concatenate([np.broadcast_to(band, (len(large), *band.shape)), large], axis=1)
