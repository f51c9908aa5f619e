"""Hypothesis strategies for what captions of the full repertoire say."""

from __future__ import annotations

from hypothesis import strategies as st

from dit_accel.samples.clips import BACKGROUNDS, COLORS, SHAPES
from dit_accel.samples.scenes.meaning import (
    AXES,
    BOUNCES,
    CHANGES,
    MOTIONS,
    PACES,
    SIZES,
    STRAIGHT,
    TEXTURES,
    Backdrop,
    Meaning,
    Thing,
)


def maybe(names):
    return st.none() | st.sampled_from(list(names))


@st.composite
def things(draw, colors=tuple(COLORS), shapes=tuple(SHAPES), motions=MOTIONS):
    shape, motion = draw(st.sampled_from(list(shapes))), draw(st.sampled_from(list(motions)))
    change = draw(maybe(name for name in CHANGES if shape != "ball" or name != "spinning"))
    size = None if change in ("growing", "shrinking") else draw(maybe(SIZES))
    pace = draw(maybe(PACES)) if motion in STRAIGHT else None
    return Thing(draw(st.sampled_from(list(colors))), shape, motion, size, change, pace)


@st.composite
def meanings(draw):
    texture = draw(maybe(TEXTURES))
    drift = draw(maybe(AXES)) if texture else None
    camera = draw(maybe(AXES)) if texture and not drift else None
    motions = [name for name in MOTIONS if camera is None or name not in BOUNCES]
    shown = [draw(things(motions=motions))]
    if draw(st.booleans()):
        colors = [name for name in COLORS if name != shown[0].color]
        shapes = [name for name in SHAPES if name != shown[0].shape]
        shown.append(draw(things(colors, shapes, motions)))
    return Meaning(tuple(shown), Backdrop(draw(st.sampled_from(list(BACKGROUNDS))), texture, drift), camera)
