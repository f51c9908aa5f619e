"""The study of the remainder: what it captures, and that it writes its page."""

from __future__ import annotations

from dit_accel.presets import Generation
from dit_accel.samples import study_remainder
from dit_accel.samples.captured_attention import captured, synthetic
from dit_accel.samples.tiny_random import random_wan_pipeline


def test_captured_calls_are_those_of_all_layers_at_the_steps_asked_for():
    pipe = random_wan_pipeline()
    generation = Generation(height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=2.0, fps=8)
    calls = captured(pipe, generation, "a dog", 0, (0, 2))
    layers = len(pipe.transformer.blocks)
    assert [(call.layer, call.step) for call in calls] == [(layer, step) for step in (0, 2) for layer in range(layers)]
    assert all(call.qkv[0].shape[2] == call.layout.tokens for call in calls)


def test_the_page_holds_the_bar_and_every_method(tmp_path, monkeypatch):
    chosen = [case for case in study_remainder.CASES if case.label in ("PISA", "aurora", study_remainder.DROP)]
    monkeypatch.setattr(study_remainder, "CASES", tuple(chosen))
    monkeypatch.setattr(study_remainder, "DENSITIES", (0.125, 0.25))
    study_remainder.write(synthetic()[:1], ["none"], tmp_path)
    page = (tmp_path / "remainder-study.md").read_text()
    assert all(f"| {case.label} |" in page for case in chosen)
    assert "Best published method by median error: PISA." in page
    assert "worse on 0 of 1 calls" in page
    assert len((tmp_path / "remainder-study.csv").read_text().splitlines()) == 1 + 3 * 2
    assert {path.name for path in tmp_path.glob("*.png")} == {
        "remainder-error-over-density.png",
        "remainder-error-over-time.png",
    }


def test_the_index_of_methods_links_all_of_them(monkeypatch):
    from pathlib import Path

    from dit_accel.methods.registry import list_methods
    from dit_accel.samples.recall_table import index

    monkeypatch.chdir(Path(__file__).parents[1])
    lines = index()
    for name in set(list_methods()) - {"dense"}:
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        assert "(methods/" in row, name
