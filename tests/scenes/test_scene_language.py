"""Captions of the full repertoire say exactly what they mean, and nothing that cannot be seen."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scene_cases import meanings

from dit_accel.samples import clips
from dit_accel.samples.repertoire import BASIC, FULL, repertoire_of
from dit_accel.samples.scenes.language import caption, parse
from dit_accel.samples.scenes.meaning import Backdrop, Meaning, Thing
from dit_accel.samples.tiny_random.text import byte_tokenizer
from dit_accel.samples.tiny_wan_model import make_tokenizer

BALL = Thing("red", "ball", "right")
TOKENIZER = make_tokenizer(FULL)


@settings(max_examples=300, deadline=None)
@given(meanings(), st.integers(0, 2**32 - 1))
def test_every_caption_is_read_back_exactly(meaning, seed):
    text = caption(meaning, np.random.default_rng(seed))
    assert parse(text) == meaning
    assert parse(text.upper()) == meaning
    ids = TOKENIZER(text)["input_ids"]
    assert TOKENIZER.unk_token_id not in ids
    assert len(ids) < FULL.text_tokens


@settings(max_examples=50, deadline=None)
@given(meanings())
def test_every_meaning_has_several_captions(meaning):
    rng = np.random.default_rng(0)
    assert len({caption(meaning, rng) for _ in range(40)}) > 1


def test_captions_of_the_basic_repertoire_belong_to_the_full_one():
    rng = np.random.default_rng(1)
    for _ in range(100):
        scene = clips.draw_scene(rng)
        thing = Thing(scene.color, scene.shape, scene.direction)
        assert parse(clips.caption(scene, rng)) == Meaning((thing,), Backdrop(scene.background))
    assert set(BASIC.vocabulary) < set(FULL.vocabulary)


def test_a_tokenizer_tells_what_its_model_was_taught():
    assert repertoire_of(make_tokenizer(BASIC)) is BASIC
    assert repertoire_of(TOKENIZER) is FULL
    with pytest.raises(ValueError, match="basic, full"):
        repertoire_of(byte_tokenizer("t5", 64))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("red ball moving right", "'a' or 'an'"),
        ("a red giraffe moving right", "giraffe"),
        ("a red ball moving", "the end"),
        ("a red ball moving right on a striped background", "background"),
        ("a red ball moving right quickly", "quickly"),
        ("a spinning red ball moving right", "spin"),
        ("a red ball moving right and a red star at rest", "differ"),
        ("a red ball moving right as the camera pans left", "camera"),
    ],
)
def test_what_is_no_caption_is_refused_by_name(text, word):
    with pytest.raises(ValueError, match=word):
        parse(text)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: Thing("mauve", "ball", "right"), "color"),
        (lambda: Thing("red", "ball", "right", size="tiny"), "size"),
        (lambda: Thing("red", "star", "right", size="small", change="growing"), "size"),
        (lambda: Thing("red", "star", "rest", pace="fast"), "pace"),
        (lambda: Backdrop("gray", None, "left"), "drift"),
        (lambda: Meaning((), Backdrop("gray")), "things"),
        (lambda: Meaning((BALL,), Backdrop("gray", "dots", "left"), "left"), "camera"),
        (lambda: Meaning((Thing("red", "ball", "upright"),), Backdrop("gray", "dots"), "left"), "camera"),
    ],
)
def test_what_nobody_could_see_is_refused(make, what):
    with pytest.raises(ValueError, match=what):
        make()
