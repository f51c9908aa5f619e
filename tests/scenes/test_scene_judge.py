"""The judge of the full repertoire on clips that are right, and on clips that are wrong in one thing."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from dit_accel.samples.clips import SHAPES
from dit_accel.samples.held_out import criteria, held_out_tasks
from dit_accel.samples.repertoire import FULL, to_frames
from dit_accel.samples.scenes.draw import Canvas, stage
from dit_accel.samples.scenes.judge import CRITERIA, judge, name_things, things_of, view
from dit_accel.samples.scenes.meaning import Backdrop, Meaning, Thing
from dit_accel.samples.scenes.render import render_scenes
from dit_accel.samples.shape_matching import likeliest_shape, match_shapes, templates

CANVAS = Canvas(33, 64, 64)


def test_the_judge_finds_drawn_clips_right():
    tasks = held_out_tasks(FULL, 40, CANVAS, 0)
    verdicts = [task.judge(task.truth()) for task in tasks]
    assert criteria(FULL) == CRITERIA
    for name in CRITERIA:
        found = [v[name] for v in verdicts if v[name] is not None]
        assert found, name
        assert np.mean(found) > 0.94, name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("shape", {"shape": "cross"}),
        ("motion", {"motion": "down left"}),
        ("motion", {"motion": "rest", "pace": None}),
        ("motion", {"motion": "sideways", "pace": None}),
        ("size", {"size": "small"}),
        ("pace", {"pace": "slow"}),
        ("change", {"change": "growing", "size": None}),
        ("change", {"change": "spinning"}),
    ],
)
def test_the_judge_tells_what_is_wrong(name, change):
    said = Meaning((Thing("red", "star", "up right", "large", None, "fast"),), Backdrop("navy"))
    other = Meaning((replace(said.things[0], **change),), Backdrop("navy"))
    assert judge(drawn(said), said)[name]
    assert not judge(drawn(other), said)[name]
    assert judge(drawn(other), other)[name]


@pytest.mark.parametrize(
    ("name", "said", "other"),
    [
        ("background", (Backdrop("navy"), None), (Backdrop("gray"), None)),
        ("texture", (Backdrop("gray", "dots"), None), (Backdrop("gray", "checks"), None)),
        ("texture", (Backdrop("gray", "stripes"), None), (Backdrop("gray"), None)),
        ("drift", (Backdrop("gray", "checks", "left"), None), (Backdrop("gray", "checks", "up"), None)),
        ("drift", (Backdrop("gray", "checks"), None), (Backdrop("gray", "checks", "up"), None)),
        ("camera", (Backdrop("gray", "dots"), "left"), (Backdrop("gray", "dots"), "right")),
    ],
)
def test_the_judge_tells_a_wrong_backdrop(name, said, other):
    things = (Thing("red", "star", "up right"),)
    said, other = Meaning(things, *said), Meaning(things, *other)
    assert judge(drawn(said), said)[name]
    assert not judge(drawn(other), said)[name]
    assert judge(drawn(other), other)["motion"]


def test_a_missing_and_a_strange_thing_are_noticed():
    red, blue = Thing("red", "star", "up"), Thing("blue", "ball", "down")
    both, one = Meaning((red, blue), Backdrop("black")), Meaning((red,), Backdrop("black"))
    right, alone = drawn(both), drawn(one)
    assert judge(right, both)["count"]
    assert not judge(alone, both)["count"]
    assert not judge(alone, both)["shape"]
    assert not judge(right, one)["color"]
    assert (
        things_of(right)
        == {"color": "blue & red", "shape": "ball & star"}
        == name_things([("red", "star"), ("blue", "ball")])
    )
    nothing = np.zeros((9, 64, 64, 3), np.uint8)
    assert things_of(nothing) == {"color": "none", "shape": "none"}
    assert not any(judge(nothing, one)[name] for name in ("color", "shape", "motion", "count", "size", "change"))
    assert view(nothing).background == "black"


def test_templates_are_found_again_in_any_size_and_place_and_turned_ones_when_turned():
    for name in SHAPES:
        (upright,) = templates(name, 1)
        moved = np.pad(upright.clip(0, 1), ((3, 9), (11, 2)))
        assert likeliest_shape([moved, moved[::2, ::2]]) == name
        turned = templates(name, 4)
        assert len(turned) == 4
        unlike = match_shapes([turned[1].clip(0, 1)], 4)[name]
        assert unlike.argmin() == (0 if name == "ball" else 1)
    assert likeliest_shape([]) == "none"


def test_rounded_corners_do_not_make_a_ball_of_a_shape():
    for name in SHAPES:
        (upright,) = templates(name, 1)
        blurred = cv2.GaussianBlur(upright.clip(0, 1), (0, 0), 0.22 * len(upright) / 4)
        assert likeliest_shape([np.clip((blurred - 0.5) * 3 + 0.5, 0, 1)]) == name


def drawn(meaning, seed=0):
    """A clip of a given meaning."""
    scene = stage(meaning, np.random.default_rng(seed), CANVAS)
    return to_frames(render_scenes([scene], CANVAS)[0][0])
