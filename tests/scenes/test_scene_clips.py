"""Scenes of the full repertoire: the same for a seed, inside the canvas, and drawn as an independent drawing says."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from itertools import islice

import cv2
import numpy as np
import pytest
import torch

from dit_accel.samples import clips
from dit_accel.samples.clips import BACKGROUNDS, COLORS, SHAPES, outline
from dit_accel.samples.repertoire import BASIC, FULL, to_frames
from dit_accel.samples.scenes.batches import draw_batch
from dit_accel.samples.scenes.draw import Body, Canvas, Scene, draw_meaning, draw_scene
from dit_accel.samples.scenes.meaning import MOTIONS, TEXTURES, Backdrop, Meaning, Thing, is_held_out
from dit_accel.samples.scenes.render import TONE, render_scenes

CANVAS = Canvas(9, 40, 48)


def scene_of(shape="star", texture=None, slide=(0.0, 0.0), turn=0.0, upright=True):
    meaning = Meaning((Thing("red", shape, "right"),), Backdrop("gray", texture))
    body = Body((20.3, 18.7), (0.6, 0.1), (9.0, 9.0), turn)
    return Scene(meaning, (body,), 14.0, (3.0, 5.0), slide, upright)


def test_the_basic_repertoire_stays_what_the_shipped_weights_were_made_with():
    rng, text = np.random.default_rng(5), hashlib.sha256()
    for held_out in (False, True):
        for _ in range(20):
            scene = clips.draw_scene(rng, held_out)
            text.update(f"{scene} {clips.caption(scene, rng)}\n".encode())
    text.update(" ".join(BASIC.vocabulary).encode())
    assert text.hexdigest() == "8fe88c1fbbdbd8b01ab41d0be2ede0d03af896ddcfd16c9becfea036efaefe2e"


def test_batches_of_basic_clips_are_the_clips():
    batch = next(BASIC.batches(3, Canvas(5, 32, 40), 4))
    for number, (clip, words, mask) in enumerate(islice(clips.captioned_clips(3, 5, 32, 40), 4)):
        assert np.array_equal(to_frames(batch.pixels[number]), clip)
        assert np.array_equal(batch.objects[number].numpy(), mask)
        assert batch.captions[number] == words


def test_full_clips_are_the_same_for_a_seed_and_for_any_number_of_workers():
    here, there = (FULL.batches(2, CANVAS, 3, workers=workers) for workers in (0, 1))
    for first, second in islice(zip(here, there, strict=True), 2):
        assert first.captions == second.captions
        assert torch.equal(first.pixels, second.pixels)
        assert torch.equal(first.objects, second.objects)
    there.close()
    assert draw_batch(2, CANVAS, 3, False, 1)[1] == first.captions
    assert first.pixels.shape == (3, 3, 9, 40, 48)
    assert first.pixels.abs().max() <= 1


def test_every_word_and_meaning_is_drawn_and_none_held_out():
    rng = np.random.default_rng(0)
    for held_out in (False, True):
        drawn = [draw_meaning(rng, held_out) for _ in range(600)]
        things = [thing for meaning in drawn for thing in meaning.things]
        assert {is_held_out(thing) for thing in things} == {held_out}
        assert {thing.motion for thing in things} == set(MOTIONS)
        assert {thing.color for thing in things} == set(COLORS)
        assert {thing.shape for thing in things} == set(SHAPES)
        assert {thing.size for thing in things} == {None, "small", "large"}
        assert {thing.change for thing in things} == {None, "spinning", "growing", "shrinking"}
        assert {thing.pace for thing in things} == {None, "slow", "fast"}
        assert {meaning.backdrop.texture for meaning in drawn} == {None, *TEXTURES}
        assert {meaning.camera for meaning in drawn} == {None, "left", "right", "up", "down"}
        assert {len(meaning.things) for meaning in drawn} == {1, 2}
    assert is_held_out(Thing("red", "ball", "up left")) == clips.is_held_out("red", "ball", "up left")


@pytest.mark.parametrize("endless", [False, True])
def test_things_stay_on_the_canvas_and_two_of_them_apart(endless):
    rng, canvas, apart = np.random.default_rng(1), Canvas(33, 64, 64, endless), []
    for _ in range(80):
        scene = draw_scene(rng, canvas)
        places = [body.centers(canvas) for body in scene.bodies]
        assert min(place.min() for place in places) > 0
        assert max(place.max() for place in places) < 64
        if len(places) == 2:
            reach = sum(body.radii(33) for body in scene.bodies)
            apart.append((np.linalg.norm(places[0] - places[1], axis=1) > 0.8 * reach).all())
        if endless:
            later = [body.centers(replace(canvas, frames=400)) for body in scene.bodies]
            assert all((body.radii(33) == body.radius[0]).all() for body in scene.bodies)
            assert min(place.min() for place in later) > 0
            assert max(place.max() for place in later) < 64
    assert np.mean(apart) > 0.75


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("turn", [0.0, 0.11])
def test_shapes_cover_what_a_finer_drawing_covers(shape, turn):
    fine, scene = 16, scene_of(shape, turn=turn)
    pixels, mask = render_scenes([scene], CANVAS)
    for frame in (0, 7):
        center = scene.bodies[0].centers(CANVAS)[frame]
        picture = np.zeros((40 * fine, 48 * fine), np.uint8)
        middle = np.round((center + 0.5) * fine - 0.5).astype(int)
        if shape == "ball":
            cv2.circle(picture, [int(x) for x in middle], round(9 * fine), 255, -1)
        else:
            cos, sin = np.cos(turn * frame), np.sin(turn * frame)
            corners = outline(shape) @ np.array([[cos, sin], [-sin, cos]]) * 9 * fine
            cv2.fillPoly(picture, [np.round(middle + corners).astype(np.int32)], 255)
        expected = cv2.resize(picture, (48, 40), interpolation=cv2.INTER_AREA) / 255
        red, gray = np.array(COLORS["red"]), np.array(BACKGROUNDS["gray"])
        found = (to_frames(pixels[0])[frame] - gray) @ (red - gray) / ((red - gray) @ (red - gray))
        assert np.abs(found - expected).max() < 0.35
        assert abs(found.sum() - expected.sum()) < 0.04 * expected.sum()
        assert np.array_equal(found > 0.01, mask[0, frame].numpy() & (found > 0.01))


@pytest.mark.parametrize("texture", list(TEXTURES))
def test_textures_have_their_period_and_slide(texture):
    scene = scene_of(texture=texture, slide=(0.5, 0.0))
    away = replace(scene, bodies=(replace(scene.bodies[0], start=(-60.0, -60.0)),))
    image = to_frames(render_scenes([away], CANVAS)[0][0]).astype(int)
    assert {int(image.min()), int(image.max())} == {int(125 - TONE), int(125 + TONE)}
    assert np.array_equal(image[:, :, 14:], image[:, :, :-14])
    assert np.array_equal(image[2, :, 1:], image[0, :, :-1])
    assert not np.array_equal(image[1], image[0])
    if texture == "stripes":
        assert (image == image[:, :1]).all()
        lying = to_frames(render_scenes([replace(away, is_upright=False, slide=(0.0, 0.5))], CANVAS)[0][0])
        assert (lying == lying[:, :, :1]).all()
        assert np.array_equal(lying[2, 1:], lying[0, :-1])


def test_a_panning_camera_carries_things_and_ground_alike():
    rng, canvas, seen = np.random.default_rng(2), Canvas(33, 64, 64), 0
    while seen < 10:
        scene = draw_scene(rng, canvas)
        resting = [b for t, b in zip(scene.meaning.things, scene.bodies, strict=True) if t.motion == "rest"]
        if scene.meaning.camera and resting:
            seen += 1
            assert all(np.allclose(body.velocity, scene.slide) for body in resting)
            assert {"left": scene.slide[0] > 0, "right": scene.slide[0] < 0}.get(scene.meaning.camera, True)
            assert {"up": scene.slide[1] > 0, "down": scene.slide[1] < 0}.get(scene.meaning.camera, True)


def test_later_things_are_drawn_over_earlier_ones():
    first, scene = Thing("blue", "square", "right"), scene_of("ball")
    meaning = Meaning((first, scene.meaning.things[0]), Backdrop("gray"))
    both = replace(scene, meaning=meaning, bodies=(replace(scene.bodies[0], radius=(12.0, 12.0)), scene.bodies[0]))
    pixels, mask = render_scenes([both, scene], CANVAS)
    image = to_frames(pixels[0])
    assert tuple(image[0, 18, 20]) == COLORS["red"]
    assert tuple(image[0, 9, 11]) == COLORS["blue"]
    assert mask[0].sum() > mask[1].sum()
    assert torch.equal(render_scenes([scene], CANVAS)[0][0], pixels[1])
