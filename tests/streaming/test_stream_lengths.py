"""Chunks and latent frames of a stream of the command, without a model."""

from __future__ import annotations

import pytest

from dit_accel.cli.prompts import PromptChange
from dit_accel.cli.stream_lengths import check_positions, chunks_of, frames_before
from dit_accel.errors import ConfigError
from dit_accel.presets import load_preset
from dit_accel.streaming import StreamSettings

ABSOLUTE = StreamSettings(window=12, sink=3)  # chunks of 3
NOTHING = dict.fromkeys(("num_chunks", "num_frames", "seconds", "live", "fps", "image"))


@pytest.mark.parametrize("image", [None, "first.png"])
@pytest.mark.parametrize("first", [None, 1, 2, 6])
@pytest.mark.parametrize("frames", [1, 5, 8, 9, 33, 81])
def test_chunks_are_the_fewest_that_hold_the_frames(image, first, frames):
    settings = ABSOLUTE.model_copy(update={"first_chunk": first})
    options = {**NOTHING, "num_frames": frames, "image": image}
    chunks = chunks_of(options, load_preset("wan2.1-t2v-1.3b-480p"), settings)
    lengths = [1 if image else first or 3] + [3] * (chunks - 1)
    made = [1 + 4 * (sum(lengths[:count]) - 1) for count in range(1, chunks + 1)]
    assert made[-1] >= frames
    assert chunks == 1 + bool(image) or made[-2] < frames
    assert [frames_before(n, settings, image is not None) for n in range(1, chunks + 2)] == [
        sum(lengths[:n]) for n in range(chunks + 1)
    ]


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("cuts", [(), (5,), (2, 9), (7, 12)])
@pytest.mark.parametrize("chunks", [1, 2, 12, 13])
def test_the_longest_scene_must_have_positions(chunks, cuts, image):
    cuts = [cut for cut in cuts if cut <= chunks]
    changes = [PromptChange(prompt="a"), *(PromptChange(prompt="b", chunk=cut, mode="cut") for cut in cuts)]
    changes.append(PromptChange(prompt="c", chunk=99, mode="keep"))
    scenes, begins = [], {1, *cuts}
    for chunk in range(1, chunks + 1):
        if chunk in begins:
            scenes.append(0)
        scenes[-1] += 1 if image and chunk == 1 else 3
    check_positions(chunks, ABSOLUTE, changes, image, max(scenes))
    with pytest.raises(ConfigError, match=f"in a scene.*got {max(scenes)}; make the stream shorter"):
        check_positions(chunks, ABSOLUTE, changes, image, max(scenes) - 1)
    check_positions(chunks, ABSOLUTE.model_copy(update={"positions": "reindex"}), changes, image, 0)


@pytest.mark.parametrize("mode", ["recache", "blend"])
def test_positions_that_a_new_sink_renews_are_left_to_the_stream(mode):
    change = PromptChange(prompt="b", chunk=6, mode=mode)
    with pytest.raises(ConfigError, match="in a scene"):
        check_positions(9, ABSOLUTE, [change], False, 10)
    check_positions(9, ABSOLUTE.model_copy(update={"keep_sink": False}), [change], False, 10)
