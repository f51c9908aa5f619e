"""The study of the remainder: what it captures, and that it writes its page."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.nn import functional as F

from dit_accel.methods.registry import get_method
from dit_accel.presets import Generation, load_preset
from dit_accel.samples import remainder_cases, study_remainder
from dit_accel.samples.captured_attention import captured, synthetic
from dit_accel.samples.rank_methods import PAIRS
from dit_accel.samples.recall_table import ranking
from dit_accel.samples.remainder_cases import BAR_DENSITY, DROP, EVERY_CALL, Case, whole_blocks
from dit_accel.samples.remainder_report import read_figures, write_all
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.state import CallContext

CALLS = synthetic()[:1]


def test_captured_calls_are_those_of_all_layers_at_the_steps_asked_for():
    pipe = random_wan_pipeline()
    generation = Generation(height=32, width=32, num_frames=5, num_inference_steps=3, guidance_scale=2.0, fps=8)
    calls = captured(pipe, generation, "a dog", 0, (0, 2))
    layers = len(pipe.transformer.blocks)
    assert [(call.layer, call.step) for call in calls] == [(layer, step) for step in (0, 2) for layer in range(layers)]
    assert all(call.qkv[0].shape[2] == call.layout.tokens for call in calls)


def test_the_page_holds_the_bar_and_every_method(tmp_path, monkeypatch):
    chosen = tuple(case for case in remainder_cases.CASES if case.label in ("PISA", "aurora", DROP, EVERY_CALL))
    monkeypatch.setattr(remainder_cases, "CASES", chosen)
    monkeypatch.setattr(remainder_cases, "DENSITIES", (0.125, 0.25))
    calls = synthetic()[:1]
    figures = study_remainder.measured(calls, study_remainder.runs(), "a field")
    text = write_all(figures, figures[:3], ["none"], "a command", tmp_path)
    assert (tmp_path / "remainder-study.md").read_text() == text
    assert all(f"| {case.label} |" in text for case in chosen)
    assert "Best published method by median error: PISA." in text
    assert "worse on 0 of 1 calls" in text
    read = read_figures(tmp_path / "remainder-study.csv")
    assert [(f.label, f.call, f.requested) for f in read] == [(f.label, f.call, f.requested) for f in figures]
    assert len(read) == 4 + 3
    assert {path.name for path in tmp_path.iterdir()} == {
        "remainder-study.md",
        "remainder-study.csv",
        "remainder-error-over-density.png",
        "remainder-error-over-time.png",
    }


def test_all_methods_get_as_many_whole_blocks():
    call = synthetic()[0]
    assert whole_blocks(0.13, call.layout.tokens) == 4 / 32
    assert whole_blocks(0.001, call.layout.tokens) == 1 / 32
    chosen = [(case, 0.13) for case in remainder_cases.CASES if case.label in ("PISA", "aurora")]
    assert [f.density for f in study_remainder.measured([call], chosen)] == [pytest.approx(4 / 32)] * 2


def test_a_kept_order_is_that_of_the_first_of_its_steps_and_its_cost_is_shared():
    first, last = replace(synthetic(seed=1)[1], step=2), replace(synthetic(seed=0)[1], step=4)
    kept = Case("kept", "aurora", {"renew": 3, "clusters": 8}, "ours")
    figures = study_remainder.measured([last], [(kept, BAR_DENSITY)], earlier=[first, last])
    method = get_method("aurora", density=BAR_DENSITY, clusters=8)
    order = method.order(*first.qkv, CallContext(first.layout, step=2))
    q, k, v = order.apply(*last.qkv)
    context = CallContext(last.layout)
    out = order.restore(method.compute(q, k, v, method.select(q, k, context), context))
    dense = F.scaled_dot_product_attention(*last.qkv)
    assert figures[0].error == pytest.approx(float((out - dense).norm() / dense.norm()), rel=1e-4)
    assert figures[0].moving == 0


def test_steps_at_which_kept_orders_are_made(monkeypatch):
    assert study_remainder.steps_before([5, 11]) == {2, 5, 8, 11}
    monkeypatch.setattr(remainder_cases, "CASES", (Case("kept", "aurora", {"renew": 3}), Case("PISA", "pisa")))
    assert study_remainder.steps_before([4, 9]) == {2, 4, 7, 9}
    with pytest.raises(SystemExit, match="capture step 2 or later"):
        study_remainder.steps_before([1])


def test_a_killed_run_goes_on(tmp_path, monkeypatch):
    prompts, seen = ["one", "two"], []
    preset = load_preset("tiny-wan")
    every = study_remainder.folder_of(tmp_path, preset, prompts, [0])
    monkeypatch.setattr(remainder_cases, "CASES", remainder_cases.CASES[:1])
    monkeypatch.setattr(study_remainder, "captured", lambda pipe, generation, prompt, *_: seen.append(prompt) or CALLS)
    first = study_remainder.on_calls(None, preset, prompts[:1], [0], tmp_path)
    whole = study_remainder.on_calls(None, preset, prompts, [0], tmp_path)
    assert seen == prompts
    assert [figure.call for figure in whole] == [figure.call.replace("one", p) for p in prompts for figure in first]
    here = study_remainder.folder_of(tmp_path, preset, prompts, [0])
    assert here == study_remainder.folder_of(tmp_path, preset, prompts, [0])
    assert here not in (every, study_remainder.folder_of(tmp_path, preset, prompts, [4]))


def test_the_page_of_methods_takes_over_the_pairs_of_the_ranking(tmp_path):
    path = tmp_path / "ranking.md"
    assert ranking(path) == []
    path.write_text(f"# Methods ranked\n\na table\n\n{PAIRS}\n\n| method |\n|---|\n| pisa |\n")
    lines = ranking(path)
    assert lines[-4:] == ["| method |", "|---|", "| pisa |", ""]
    assert "a table" not in "\n".join(lines)


def test_the_index_of_methods_links_all_of_them(monkeypatch):
    from pathlib import Path

    from dit_accel.methods.registry import list_methods
    from dit_accel.samples.recall_table import index

    monkeypatch.chdir(Path(__file__).parents[1])
    lines = index()
    for name in set(list_methods()) - {"dense"}:
        row = next(line for line in lines if line.startswith(f"| `{name}` |"))
        assert "(methods/" in row, name
