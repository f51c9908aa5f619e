"""Captions of the full repertoire: several for each meaning, and every one of them read back exactly."""

from __future__ import annotations

import numpy as np

from dit_accel.samples.clips import BACKGROUNDS, COLORS, DEFAULT_BACKGROUND, SHAPES, VERBS
from dit_accel.samples.scenes.meaning import (
    AXES,
    BOUNCES,
    CHANGES,
    PACES,
    REST,
    SIZES,
    STRAIGHT,
    TEXTURES,
    Backdrop,
    Meaning,
    Phrases,
    Thing,
)

_COLORS: Phrases = {name: (name,) for name in COLORS}
_BACKGROUNDS: Phrases = {name: (name,) for name in BACKGROUNDS}
_AXES: Phrases = {name: STRAIGHT[name] for name in AXES}
_WITH: Phrases = {name: (f"with {name}",) for name in TEXTURES}
_ARTICLE: Phrases = {"article": ("a", "an")}
_VERB: Phrases = {"verb": VERBS}
_DRIFT: Phrases = {"drift": ("drifting", "that drifts")}
_CAMERA: Phrases = {"camera": ("as the camera pans", "while the camera pans")}
_AND: Phrases = {"and": ("and",)}
_ON: Phrases = {"on": ("on a",)}
_GROUND: Phrases = {"ground": ("background",)}
_TABLES = (_COLORS, _BACKGROUNDS, _AXES, _WITH, _ARTICLE, _VERB, _DRIFT, _CAMERA, _AND, _ON, _GROUND)
_SPOKEN = (*_TABLES, SHAPES, SIZES, CHANGES, PACES, BOUNCES, REST, STRAIGHT, TEXTURES)


def caption(meaning: Meaning, rng: np.random.Generator) -> str:
    """One of several phrasings of `meaning`; a plain black backdrop may go unsaid."""
    text = " and ".join(_say_thing(thing, rng) for thing in meaning.things)
    if meaning.backdrop != Backdrop(DEFAULT_BACKGROUND) or rng.random() < 0.5:
        text += f" on a {_say_backdrop(meaning.backdrop, rng)}"
    if meaning.camera is not None:
        text += f" {_pick(_CAMERA, 'camera', rng)} {_pick(STRAIGHT, meaning.camera, rng)}"
    return text


def _say_thing(thing: Thing, rng: np.random.Generator) -> str:
    words = [_pick(SIZES, thing.size, rng), _pick(CHANGES, thing.change, rng), thing.color]
    words.append(_pick(SHAPES, thing.shape, rng))
    if thing.motion in STRAIGHT:
        deed = [str(rng.choice(VERBS)), _pick(PACES, thing.pace, rng)]
        words += [*(deed if rng.random() < 0.5 else deed[::-1]), _pick(STRAIGHT, thing.motion, rng)]
    else:
        words.append(_pick({**BOUNCES, **REST}, thing.motion, rng))
    text = " ".join(word for word in words if word)
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def _say_backdrop(backdrop: Backdrop, rng: np.random.Generator) -> str:
    text = f"{backdrop.color} background"
    if backdrop.texture is not None:
        is_adjective = rng.random() < 0.5
        text = f"{_pick(TEXTURES, backdrop.texture, rng)} {text}" if is_adjective else f"{text} with {backdrop.texture}"
    if backdrop.drift is not None:
        text += f" {_pick(_DRIFT, 'drift', rng)} {_pick(STRAIGHT, backdrop.drift, rng)}"
    return text


def _pick(table: Phrases, name: str | None, rng: np.random.Generator) -> str:
    return "" if name is None else str(rng.choice(table[name]))


def parse(text: str) -> Meaning:
    """The meaning that `text` was made of.

    Raises:
        ValueError: no caption of this repertoire; says which word it stumbled over.
    """
    reader = _Reader(text)
    things = [_read_thing(reader)]
    if reader.take(_AND):
        things.append(_read_thing(reader))
    backdrop = _read_backdrop(reader) if reader.take(_ON) else Backdrop(DEFAULT_BACKGROUND)
    camera = reader.need(_AXES, "a direction") if reader.take(_CAMERA) else None
    if reader.words:
        raise ValueError(f"caption: expected its end, got {reader.words[0]!r} in {text!r}")
    return Meaning(tuple(things), backdrop, camera)


class _Reader:
    """The words of a caption that are still to be read."""

    def __init__(self, text: str) -> None:
        self.text, self.words = text, text.lower().split()

    def take(self, table: Phrases) -> str | None:
        """The name whose phrase comes next, the longest such phrase; it is read. None: no phrase of the table."""
        found = [(phrase.split(), name) for name, phrases in table.items() for phrase in phrases]
        fitting = [(words, name) for words, name in found if self.words[: len(words)] == words]
        if not fitting:
            return None
        words, name = max(fitting, key=lambda pair: len(pair[0]))
        self.words = self.words[len(words) :]
        return name

    def need(self, table: Phrases, what: str) -> str:
        """As `take`, but there must be one."""
        name = self.take(table)
        if name is None:
            got = repr(self.words[0]) if self.words else "the end"
            raise ValueError(f"caption: expected {what}, got {got} in {self.text!r}")
        return name


def _read_thing(reader: _Reader) -> Thing:
    reader.need(_ARTICLE, "'a' or 'an'")
    size, change = reader.take(SIZES), reader.take(CHANGES)
    color, shape = reader.need(_COLORS, "a colour"), reader.need(SHAPES, "a shape")
    motion = reader.take({**BOUNCES, **REST})
    if motion is not None:
        return Thing(color, shape, motion, size, change)
    before = reader.take(PACES)
    reader.need(_VERB, "a verb")
    pace = before or reader.take(PACES)
    return Thing(color, shape, reader.need(STRAIGHT, "a direction"), size, change, pace)


def _read_backdrop(reader: _Reader) -> Backdrop:
    adjective = reader.take(TEXTURES)
    color = reader.need(_BACKGROUNDS, "a background")
    reader.need(_GROUND, "'background'")
    texture = adjective or reader.take(_WITH)
    drift = reader.need(_AXES, "a direction") if reader.take(_DRIFT) else None
    return Backdrop(color, texture, drift)


def vocabulary() -> list[str]:
    """Every word that a caption can hold, sorted."""
    phrases = (phrase for table in _SPOKEN for names in table.values() for phrase in names)
    return sorted({word for phrase in phrases for word in phrase.split()})
