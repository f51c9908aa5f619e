"""What a stream says of its attention calls: a record each for the latest chunk, sums for those before."""

from __future__ import annotations

import pytest
from stream_cases import FRAME, latents, text, tiny_transformer

from dit_accel.methods.registry import get_method
from dit_accel.pipelines.streaming import records
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.planned import PlannedContext
from dit_accel.pipelines.streaming.records import StreamCalls
from dit_accel.pipelines.streaming.rolling import make_driver
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings

LAYERS, STEPS, CHUNK, WINDOW = 2, (1000.0, 750.0, 500.0), 2, 8


@pytest.fixture(scope="module")
def runtime():
    return CausalWan(tiny_transformer(layers=LAYERS))


def drive(runtime, policy=DenseContext, chunks=6, guided=False, **changes):
    """A driver that has made some chunks."""
    values = {"chunk": CHUNK, "window": WINDOW, "sink": 2, "steps": STEPS, **changes}
    settings = StreamSettings(**values, guidance_scale=2.0 if guided else 1.0)
    driver = make_driver(runtime, settings, text(), FRAME, 0, negative=text(1) if guided else None, policy=policy)
    for _ in range(chunks):
        driver.next()
    return driver


def calls_of(driver):
    return driver.calls.report({}).to_dict()["calls"]


def test_every_call_of_the_latest_chunk_has_one_record(runtime):
    driver = drive(runtime, guided=True)
    calls = calls_of(driver)
    told = [(x["layer"], x["step"], x["branch"]) for x in calls]
    places = {
        (layer, step, name)
        for layer in range(LAYERS)
        for step in range(-1, len(STEPS))  # -1: the chunk before is written to the cache
        for name in ("cond", "uncond")
    }
    assert len(told) == len(places)
    assert set(told) == places
    assert {x["generation"] for x in calls} == {5}
    assert all(x["density"] == 1.0 and x["reason"] == "attention of the stream is dense" for x in calls)
    assert all(x["attend_ms"] > 0 for x in calls)


def test_a_stream_of_any_length_keeps_one_chunk_and_bounded_sums(runtime, monkeypatch):
    monkeypatch.setattr(records, "SUMMARIES", 3)
    driver = drive(runtime, chunks=12)
    assert len(calls_of(driver)) == LAYERS * (len(STEPS) + 1)
    sums = driver.calls.chunks
    assert [x["chunk"] for x in sums] == [9, 10, 11, 12]
    assert {x["calls"] for x in sums} == {LAYERS * (len(STEPS) + 1)}
    assert all(x["seconds"]["attend"] > 0 and x["density"] == 1.0 for x in sums)


def test_given_frames_and_prompt_changes_count_for_their_chunks(runtime):
    driver = drive(runtime, chunks=0)
    driver.give(latents(4))
    driver.next()
    driver.switch(text(2), "recache")
    driver.next()
    passes = [x["calls"] // LAYERS for x in driver.calls.chunks]
    # Nothing is computed for the first given chunk; a recache repeats the window after the chunk before was written.
    assert passes == [0, 1, 1 + len(STEPS), 2 + len(STEPS)]
    assert driver.calls.chunks[0]["density"] is None


def test_numbers_go_on_where_a_stream_is_resumed():
    calls = StreamCalls()
    calls.begin_at(7)
    assert calls.chunks == []
    for _ in range(2):
        calls.finish_chunk()
    assert [x["chunk"] for x in calls.chunks] == [8, 9]


def test_a_rolling_window_has_records_too(runtime):
    driver = drive(runtime, chunks=5, rolling=True, window=10, positions="sink_adjacent")
    assert [x["chunk"] for x in driver.calls.chunks] == [1, 2, 3, 4, 5]
    # A full window makes a chunk with one pass; the other writes the chunk before.
    assert len(calls_of(driver)) == 2 * LAYERS


def test_light_forcing_says_what_it_was_asked_for_and_what_it_computed(runtime, monkeypatch):
    shares, original = [], LightForcing.plan

    def plan(self, call, q, k, sparsity):
        made = original(self, call, q, k, sparsity)
        mask = made.to_mask()
        rows, columns = made.q_blocks.lengths, made.k_blocks.lengths
        pairs = (rows.view(-1, 1) * columns).double()
        shares.append(((1 - sparsity * 6 / 8), float((mask.double() * pairs).sum() / pairs.sum() / mask.shape[1])))
        return made

    monkeypatch.setattr(LightForcing, "plan", plan)
    driver = drive(runtime, lambda: LightForcing(block=2, window=WINDOW))
    sparse = [x for x in calls_of(driver) if x["reason"] is None]
    assert len(sparse) == LAYERS * len(STEPS)
    for call, (asked, computed) in zip(sparse, shares[-len(sparse) :], strict=True):
        assert call["requested_density"] == pytest.approx(asked)
        assert call["density"] == pytest.approx(computed, abs=1e-5)
        assert call["density"] < 1
        assert call["select_ms"] > 0
        assert call["method"] == "light_forcing"
    assert driver.calls.chunks[0]["dense_reasons"] == {"the budget after 2 frames keeps all of the past": 6}
    assert driver.calls.chunks[5]["dense_reasons"] == {"the pass that writes the cache is dense": 2}


def test_a_method_in_the_window_says_what_it_computed(runtime):
    method = get_method("radial", density=0.5, block=6)
    driver = drive(runtime, lambda: PlannedContext(method))
    calls = calls_of(driver)
    sparse = [x for x in calls if x["reason"] is None]
    assert len(sparse) == LAYERS * len(STEPS)
    assert {(x["method"], x["requested_density"]) for x in calls} == {("radial", 0.5)}
    assert all(0 < x["density"] < 1 and x["backend"] != "dense" and x["select_ms"] > 0 for x in sparse)
    assert driver.calls.chunks[0]["dense_reasons"] == {"2 frames are fewer than min_frames 6": 6}


def test_reused_attention_counts_what_was_computed_anew(runtime):
    driver = drive(runtime, lambda: FlashBlock({0}, {1}))
    by_place = {(x["layer"], x["step"]): x for x in calls_of(driver)}
    assert by_place[0, 0]["reason"] == "step 0 computes the past anew"
    assert by_place[1, 2]["reason"] == "layer 1 is in dense_layers"
    for step in (1, 2):
        assert (by_place[0, step]["reason"], by_place[0, step]["density"]) == (None, CHUNK / WINDOW)
    assert by_place[0, 0]["density"] == by_place[1, 2]["density"] == 1.0


def test_a_compressed_memory_counts_its_statistics_for_the_frames_they_stand_for(runtime):
    driver = drive(runtime, lambda: CompressedMemory(tile=(1, 3)), chunks=6)
    tokens, gone = 6, 12 - WINDOW  # of a frame; frames that have left the window
    (density,) = {x["density"] for x in calls_of(driver) if x["step"] >= 0}
    assert density == pytest.approx((WINDOW * tokens + 2 * gone) / (12 * tokens), abs=1e-6)
    first = driver.calls.chunks[0]
    assert first["dense_reasons"] == {"nothing has left the window yet": LAYERS * len(STEPS)}
