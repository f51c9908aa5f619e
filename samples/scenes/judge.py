"""What a clip of the full repertoire shows, found without knowing its caption, and whether it is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from dit_accel.samples.clips import BACKGROUNDS, COLORS, DIRECTIONS, outline
from dit_accel.samples.scenes.meaning import AXES, STRAIGHT, Meaning
from dit_accel.samples.shape_matching import SYMMETRY, coverage, match_shapes

CRITERIA = (
    "color",
    "shape",
    "motion",
    "background",
    "count",
    "size",
    "change",
    "pace",
    "texture",
    "drift",
    "camera",
)
_MARGIN = 40  # a pixel belongs to a thing when some channel is this far from the backdrop and its textures
_TONE = 36  # by which all channels of a backdrop may be lighter or darker
_SMALLEST, _SHARE = 12, 0.06  # pixels of a thing in a frame; its share of what belongs to things
_TURNS = 12  # angles that are tried
_UPRIGHT = 1.1  # by how much a turned template must be better than the upright one
_SIZES = (7.75, 11.25)  # radii between small, usual and large
_PACES = (0.42, 0.8)  # pixels per frame between slow, usual and fast
_STILL = 3.0  # pixels that a thing at rest may wander
_GROWS = 1.3  # ratio of late to early radii
_SPINS = 0.04  # radians per frame
_GAP, _REACH = 8, 6  # frames and pixels of comparisons that find how a texture moves
_FLAT = 7.0  # standard deviation of a plain backdrop's brightness


@dataclass(frozen=True)
class Seen:
    """One thing, as it was seen.

    Args:
        color, shape: what it is most like.
        times: frames in which it was seen, `[n]`.
        centers: (x, y) in these, `[n, 2]`.
        radii: in these, `[n]`.
        turn: radians per frame, whichever way.
    """

    color: str
    shape: str
    times: np.ndarray
    centers: np.ndarray
    radii: np.ndarray
    turn: float

    def motion(self, ground: np.ndarray) -> str:
        """Name of its motion over a ground that moves by `ground` (x, y) per frame."""
        path = self._path(ground)
        net, way = path[-1] - path[0], np.abs(np.diff(path, axis=0)).sum(0)
        axis = int(way.argmax())
        if way[axis] - abs(net[axis]) > 2 * _STILL:
            return ("sideways", "upright")[axis]
        if np.linalg.norm(net) < _STILL:
            return "rest"
        ways = {name: np.array(DIRECTIONS[name][0]) for name in STRAIGHT}
        return max(ways, key=lambda name: float(ways[name] @ net / np.linalg.norm(ways[name])))

    def speed(self, ground: np.ndarray) -> float:
        """Pixels per frame of its straight way over the ground."""
        path = self._path(ground)
        return float(np.linalg.norm(path[-1] - path[0]) / (self.times[-1] - self.times[0]))

    def _path(self, ground: np.ndarray) -> np.ndarray:
        """Its way over the ground, smoothed: wobbling outlines are no motion."""
        path = self.centers - self.times[:, None] * ground
        window = min(5, len(path))
        padded = np.pad(path, ((window // 2, (window - 1) // 2), (0, 0)), mode="reflect", reflect_type="odd")
        return np.stack([np.convolve(padded[:, i], np.ones(window) / window, mode="valid") for i in (0, 1)], axis=1)

    @property
    def size(self) -> str | None:
        """Name of its size, None for the usual one."""
        radius = float(np.median(self.radii))
        return "small" if radius < _SIZES[0] else "large" if radius > _SIZES[1] else None

    @property
    def change(self) -> str | None:
        """What it does to itself, None for nothing."""
        quarter = max(1, len(self.radii) // 4)
        ratio = float(self.radii[-quarter:].mean() / self.radii[:quarter].mean())
        if ratio > _GROWS:
            return "growing"
        if ratio < 1 / _GROWS:
            return "shrinking"
        return "spinning" if self.turn > _SPINS else None


@dataclass(frozen=True)
class View:
    """What a clip shows.

    Args:
        things: those seen, the one with most pixels first.
        background: name of the colour.
        texture: name, or None.
        slide: (x, y) by which the texture moves per frame.
    """

    things: tuple[Seen, ...]
    background: str
    texture: str | None
    slide: np.ndarray


def view(clip: np.ndarray) -> View:
    """Look at a clip, uint8 `[T, H, W, 3]`."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    base = np.median(border, axis=0)
    away = clip.astype(np.float32) - base
    away -= np.clip(away.mean(-1, keepdims=True), -_TONE, _TONE)
    masks = np.abs(away).max(-1) > _MARGIN
    ground = clip.mean(-1)
    hidden = np.stack([cv2.dilate(mask.astype(np.uint8), np.ones((5, 5), np.uint8)) for mask in masks]) > 0
    mean = clip[~hidden].mean(0) if not hidden.all() else base
    background = min(BACKGROUNDS, key=lambda name: float(np.linalg.norm(mean - np.array(BACKGROUNDS[name]))))
    texture = _texture(ground, hidden)
    slide = np.zeros(2) if texture is None else _slide(ground, hidden)
    return View(_things(clip, masks, mean), background, texture, slide)


def _things(clip: np.ndarray, masks: np.ndarray, backdrop: np.ndarray) -> tuple[Seen, ...]:
    table = np.array(list(COLORS.values()), dtype=np.float32)
    cores = np.stack([cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) for mask in masks]) > 0
    likes = np.linalg.norm(clip[cores][:, None] - table, axis=-1).argmin(1)
    counts = np.bincount(likes, minlength=len(table))
    kept = [i for i in np.argsort(-counts)[:2] if counts[i] > _SHARE * counts.sum()]
    found = []
    for index in kept:
        is_nearest = np.linalg.norm(clip[..., None, :] - table[kept], axis=-1).argmin(-1) == kept.index(index)
        parts = [_largest(mask) for mask in masks & is_nearest]
        times = np.array([t for t, part in enumerate(parts) if part.sum() >= _SMALLEST])
        if len(times) >= 2:
            color = np.median(clip[cores][likes == index], axis=0)
            found.append(
                _look(list(COLORS)[index], times, [coverage(clip[t], parts[t], color, backdrop) for t in times])
            )
    return tuple(found)


def _largest(mask: np.ndarray) -> np.ndarray:
    """The largest connected region of a bool mask."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    if count < 2:
        return np.zeros_like(mask)
    return np.asarray(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def _look(color: str, times: np.ndarray, covers: list[np.ndarray]) -> Seen:
    """Shape, place, size and turn of a thing from its soft masks."""
    unlike = match_shapes(covers, _TURNS)
    scores = {name: min(u[:, 0].sum(), _UPRIGHT * u.min(1).sum()) for name, u in unlike.items()}
    shape = min(scores, key=lambda name: float(scores[name]))
    rows, columns = np.indices(covers[0].shape)
    areas = np.array([cover.sum() for cover in covers])
    centers = np.array([[(columns * cover).sum(), (rows * cover).sum()] for cover in covers]) / areas[:, None]
    best = unlike[shape]
    turn = 0.0
    if shape in SYMMETRY and _UPRIGHT * best.min(1).sum() < best[:, 0].sum():
        period = 2 * np.pi / SYMMETRY[shape]
        angles = np.unwrap(best.argmin(1) / best.shape[1] * period, period=period)
        turn = abs(float(np.polyfit(times, angles, 1)[0]))
    return Seen(color, shape, times, centers, np.sqrt(areas / _unit_area(shape)), turn)


def _unit_area(shape: str) -> float:
    """Area of the shape of radius 1."""
    if shape == "ball":
        return float(np.pi)
    x, y = outline(shape).T
    return float(abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2)


def _texture(ground: np.ndarray, hidden: np.ndarray) -> str | None:
    """Name of the texture of a backdrop from its brightness `[T, H, W]`, where it is not `hidden`; None for plain."""
    shown = np.where(hidden, np.nan, ground)
    values = shown[~hidden]
    if not len(values) or values.std() < _FLAT:
        return None
    filled = np.where(hidden, values.mean(), ground) - values.mean()
    rows, columns = (filled.mean(axis).var(-1).mean() for axis in (2, 1))
    if max(rows, columns) > 0.5 * values.var():
        return "stripes"
    skew = ((values - values.mean()) ** 3).mean() / values.std() ** 3
    return "dots" if skew > 0.45 else "checks"


def _slide(ground: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """(x, y) by which a texture moves per frame: the shift that makes frames a little apart most alike."""
    gap = min(_GAP, len(ground) - 1)
    if gap == 0:
        return np.zeros(2)
    spread, best, found = float(ground[~hidden].std()), np.inf, np.zeros(2)
    inner = slice(_REACH, -_REACH)
    early, late = slice(0, -gap, 3), slice(gap, None, 3)
    before, is_shown = ground[early, inner, inner], ~hidden[early, inner, inner]
    height, width = ground.shape[1:]
    for dy in range(-_REACH, _REACH + 1):
        for dx in range(-_REACH, _REACH + 1):
            window = slice(_REACH + dy, height - _REACH + dy), slice(_REACH + dx, width - _REACH + dx)
            both = is_shown & ~hidden[(late, *window)]
            unlike = np.abs(ground[(late, *window)] - before)[both].mean() if both.any() else np.inf
            unlike += 0.01 * spread * np.hypot(dx, dy)  # stripes are as alike along themselves
            if unlike < best:
                best, found = unlike, np.array([dx, dy]) / gap
    return found


def _axis(slide: np.ndarray) -> str | None:
    """Name of the direction in which a texture moves, None where it does not."""
    if np.linalg.norm(slide) * _GAP < 2:
        return None
    return max(AXES, key=lambda name: float(np.array(DIRECTIONS[name][0]) @ slide))


def judge_view(seen: View, meaning: Meaning) -> dict[str, bool | None]:
    """Which criteria are met; None: the meaning says nothing that this criterion could judge."""
    by_color = {thing.color: thing for thing in seen.things}
    ground = seen.slide if meaning.camera is not None else np.zeros(2)
    pairs = [(thing, by_color.get(thing.color)) for thing in meaning.things]
    is_textured = meaning.backdrop.texture is not None
    moved = _axis(seen.slide if meaning.camera is None else -seen.slide)
    paced = [(thing, found) for thing, found in pairs if thing.motion in STRAIGHT]
    sized = [(thing, found) for thing, found in pairs if thing.change not in ("growing", "shrinking")]
    return {
        "color": set(by_color) == {thing.color for thing in meaning.things},
        "shape": all(found is not None and found.shape == thing.shape for thing, found in pairs),
        "motion": all(found is not None and found.motion(ground) == thing.motion for thing, found in pairs),
        "background": seen.background == meaning.backdrop.color,
        "count": len(seen.things) == len(meaning.things),
        "size": all(f is not None and f.size == t.size for t, f in sized) if sized else None,
        "change": all(found is not None and found.change == thing.change for thing, found in pairs),
        "pace": all(f is not None and _pace(f.speed(ground)) == t.pace for t, f in paced) if paced else None,
        "texture": seen.texture == meaning.backdrop.texture,
        "drift": moved == meaning.backdrop.drift if is_textured and meaning.camera is None else None,
        "camera": moved == meaning.camera if meaning.camera is not None else None,
    }


def _pace(speed: float) -> str | None:
    return "slow" if speed < _PACES[0] else "fast" if speed > _PACES[1] else None


def judge(clip: np.ndarray, meaning: Meaning) -> dict[str, bool | None]:
    """Which criteria a clip (uint8 `[T, H, W, 3]`) meets, see `judge_view`."""
    return judge_view(view(clip), meaning)


def name_things(things: Sequence[tuple[str, str]]) -> dict[str, str]:
    """(colour, shape) of things as one "color" and one "shape", in the order of colours; "none" without things."""
    colors, shapes = zip(*sorted(things), strict=True) if things else (("none",), ("none",))
    return {"color": " & ".join(colors), "shape": " & ".join(shapes)}


def things_of(clip: np.ndarray) -> dict[str, str]:
    """Colours and shapes of all things of a clip (uint8 `[T, H, W, 3]`), see `name_things`."""
    return name_things([(thing.color, thing.shape) for thing in view(clip).things])
