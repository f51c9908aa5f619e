"""What a caption of the full repertoire says: one or two things, what they do, the backdrop and the camera.

Colours, shapes, directions and backgrounds are those of `clips`, whose captions are captions of this repertoire too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dit_accel.samples.clips import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES

Phrases = Mapping[str, tuple[str, ...]]

SIZES: Phrases = {"small": ("small", "little"), "large": ("large", "big")}
CHANGES: Phrases = {
    "spinning": ("spinning", "rotating"),
    "growing": ("growing", "expanding"),
    "shrinking": ("shrinking", "contracting"),
}
PACES: Phrases = {"slow": ("slowly", "gently"), "fast": ("fast", "quickly")}
BOUNCES: Phrases = {
    "sideways": ("bouncing left and right", "bouncing from side to side"),
    "upright": ("bouncing up and down", "bouncing upwards and downwards"),
}
REST: Phrases = {"rest": ("standing still", "at rest")}
TEXTURES: Phrases = {"stripes": ("striped",), "checks": ("checkered",), "dots": ("dotted",)}
STRAIGHT: Phrases = {name: phrases for name, (_, phrases) in DIRECTIONS.items()}
MOTIONS = (*STRAIGHT, *BOUNCES, *REST)
AXES = ("left", "right", "up", "down")  # ways of backdrops and cameras


@dataclass(frozen=True)
class Thing:
    """One object of a scene.

    Args:
        color, shape: keys of `COLORS` and `SHAPES`.
        motion: one of `MOTIONS`.
        size: key of `SIZES`; None, which goes unsaid, is in between.
        change: key of `CHANGES`, or None.
        pace: key of `PACES`; None, which goes unsaid, is in between.

    Raises:
        ValueError: an unknown word, or something that cannot be seen: a ball that spins, a size of what changes its
            size, a pace of what does not move straight on.
    """

    color: str
    shape: str
    motion: str
    size: str | None = None
    change: str | None = None
    pace: str | None = None

    def __post_init__(self) -> None:
        _check("color", self.color, COLORS)
        _check("shape", self.shape, SHAPES)
        _check("motion", self.motion, dict.fromkeys(MOTIONS))
        for name, table in (("size", SIZES), ("change", CHANGES), ("pace", PACES)):
            if getattr(self, name) is not None:
                _check(name, getattr(self, name), table)
        if self.shape == "ball" and self.change == "spinning":
            raise ValueError("change: nobody sees a ball spin; choose another shape or change")
        if self.size and self.change in ("growing", "shrinking"):
            raise ValueError(f"size: a {self.change} thing has no one size; expected None, got {self.size!r}")
        if self.pace and self.motion not in STRAIGHT:
            raise ValueError(f"pace: only what moves straight on has one; expected None, got {self.pace!r}")


@dataclass(frozen=True)
class Backdrop:
    """What is behind the things.

    Args:
        color: key of `BACKGROUNDS`.
        texture: key of `TEXTURES`, or None for a plain one.
        drift: one of `AXES` in which a textured backdrop moves, or None.

    Raises:
        ValueError: an unknown word, or a plain backdrop that drifts.
    """

    color: str
    texture: str | None = None
    drift: str | None = None

    def __post_init__(self) -> None:
        _check("background", self.color, BACKGROUNDS)
        if self.texture is not None:
            _check("texture", self.texture, TEXTURES)
        if self.drift is not None:
            _check("drift", self.drift, dict.fromkeys(AXES))
            if self.texture is None:
                raise ValueError("drift: nobody sees a plain backdrop move; give it a texture")


@dataclass(frozen=True)
class Meaning:
    """All that a caption says.

    Args:
        things: one, or two of different colours and shapes.
        backdrop: behind them.
        camera: one of `AXES` in which the camera pans over a textured backdrop, or None. It moves everything else the
            other way; things move as said over the ground that the backdrop is.

    Raises:
        ValueError: too many or too similar things, or a camera that nobody can see pan.
    """

    things: tuple[Thing, ...]
    backdrop: Backdrop
    camera: str | None = None

    def __post_init__(self) -> None:
        if len(self.things) not in (1, 2):
            raise ValueError(f"things: expected one or two, got {len(self.things)}")
        first, last = self.things[0], self.things[-1]
        if len(self.things) == 2 and (first.color == last.color or first.shape == last.shape):
            raise ValueError("things: two of them must differ in colour and in shape")
        if self.camera is None:
            return
        _check("camera", self.camera, dict.fromkeys(AXES))
        if self.backdrop.texture is None or self.backdrop.drift is not None:
            raise ValueError("camera: it pans over a textured backdrop that does not drift itself")
        if any(thing.motion in BOUNCES for thing in self.things):
            raise ValueError("camera: it follows nothing that bounces; expected None")


def is_held_out(thing: Thing) -> bool:
    """One combination in eight of colour, shape and motion is never drawn for training; as `clips.is_held_out`."""
    index = (list(COLORS).index(thing.color), list(SHAPES).index(thing.shape), MOTIONS.index(thing.motion))
    return (index[0] + 3 * index[1] + 5 * index[2]) % 8 == 7


def _check(name: str, value: str, table: Mapping[str, object]) -> None:
    if value not in table:
        raise ValueError(f"{name}: expected one of {', '.join(table)}, got {value!r}")
