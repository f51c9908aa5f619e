"""The demo without a page: one job at a time, progress, cancelling, checked sizes, files where they belong."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.metrics import closeness
from dit_accel.pipelines.demo.jobs import Cancelled, Clip, Step, Studio
from dit_accel.pipelines.demo.views import comparison, difference, report_table
from dit_accel.presets import load_preset
from dit_accel.schedule import Schedule


@pytest.fixture(scope="module")
def studio(tmp_path_factory):
    return Studio("tiny-wan", tmp_path_factory.mktemp("demo"), device="cpu")


@pytest.fixture
def small(studio):
    return studio.generation(studio.preset, height=32, width=32, num_frames=5, num_inference_steps=2)


def test_two_runs_side_by_side(studio, small):
    every_step_dense = load_preset("tiny-wan/composed").model_copy(update={"schedule": Schedule.make(dense_steps=2)})
    runs = {"dense": load_preset("tiny-wan/dense"), "accelerated": every_step_dense}
    events = list(studio.run(runs, small, "a red ball moving right", 3))
    steps = [event for event in events if isinstance(event, Step)]
    assert [(s.run, s.number, s.total) for s in steps] == [(run, n, 2) for run in runs for n in (1, 2)]
    assert all(s.preview.shape == (32, 32, 3) for s in steps)
    clips = [event for event in events if isinstance(event, Clip)]
    assert [clip.run for clip in clips] == list(runs)
    assert all(clip.frames.shape == (5, 32, 32, 3) for clip in clips)
    assert all(clip.path.parent == studio.output_dir and clip.path.stat().st_size > 0 for clip in clips)
    path, table = comparison(*clips, studio.output_dir, small.fps)
    assert path.is_file()
    assert "| PSNR against dense | identical |" in table
    darker = replace(clips[1], frames=clips[1].frames // 2)
    near = closeness(darker.frames / 255, clips[0].frames / 255)
    _, table = comparison(clips[0], darker, studio.output_dir, small.fps)
    assert f"| PSNR against dense | {near.psnr:.1f} dB |" in table
    assert f"| SSIM against dense | {near.ssim:.3f} |" in table
    assert "attention calls" in report_table(clips[1])
    assert not studio.is_busy


def test_the_model_is_loaded_once(studio, small):
    list(studio.run({"dense": load_preset("tiny-wan/dense")}, small, "a ball", 0))
    first = studio._pipe
    list(studio.run({"dense": load_preset("tiny-wan/dense")}, small, "a ball", 0))
    assert studio._pipe is first


def test_a_second_job_is_refused_and_cancelling_ends_the_first(studio, small):
    job = studio.run(
        {"dense": load_preset("tiny-wan/dense")}, small.model_copy(update={"num_inference_steps": 200}), "a ball", 0
    )
    next(job)
    with pytest.raises(RuntimeError, match="another job is running"):
        next(studio.run({"dense": load_preset("tiny-wan/dense")}, small, "a ball", 0))
    assert studio.cancel()
    with pytest.raises(Cancelled):
        list(job)
    assert not studio.is_busy
    assert not any(thread.name == "dit-accel-demo" for thread in threading.enumerate())
    assert not list(studio.output_dir.glob(".partial-*"))
    assert not studio.cancel()


def test_closing_the_iterator_stops_the_job(studio, small):
    job = studio.run(
        {"dense": load_preset("tiny-wan/dense")}, small.model_copy(update={"num_inference_steps": 200}), "a ball", 0
    )
    next(job)
    job.close()
    assert not studio.is_busy


def test_an_error_of_the_job_reaches_the_caller_and_frees_the_studio(studio, small, monkeypatch):
    monkeypatch.setattr("dit_accel.pipelines.demo.jobs.call_pipeline", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(studio.run({"dense": load_preset("tiny-wan/dense")}, small, "a ball", 0))
    assert not studio.is_busy


def test_sizes_are_checked_before_anything_runs(studio):
    with pytest.raises(ConfigError, match=r"generation\.height"):
        studio.generation(studio.preset, height=33)
    with pytest.raises(ConfigError, match=r"generation\.num_inference_steps"):
        studio.generation(studio.preset, num_inference_steps=0)


def test_difference_is_four_times_the_distance():
    first, second = np.full((1, 2, 2, 3), 10, np.uint8), np.full((1, 2, 2, 3), 20, np.uint8)
    assert (difference(first, second) == 40).all()
    assert (difference(first, first + np.uint8(200)) == 255).all()


def test_presets_are_those_of_the_loaded_model(studio):
    assert "tiny-wan" in studio.presets()
    assert all(name.startswith("tiny-wan") for name in studio.presets())


def test_the_sizes_on_the_page_follow_the_preset():
    generate_tab = pytest.importorskip("dit_accel.pipelines.demo.generate_tab", reason="gradio is not installed")
    assert generate_tab.sizes_of("tiny-wan") == (64, 64, 33, 20)
    assert generate_tab.sizes_of("flux1-dev-2k")[:3] == (2048, 2048, 1)


def test_a_pipeline_whose_steps_cannot_be_followed_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match="HunyuanVideo15Pipeline, whose steps the page cannot follow"):
        Studio("hunyuan-video-1.5-t2v-480p", tmp_path)


def test_extras_are_part_of_loading(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny-wan\nextras: {offload: {mode: model}}\n")
    with pytest.raises(UnsupportedError, match=r"extras\.offload"):
        Studio(str(path), tmp_path, "cpu").load()


def test_the_tiny_model_runs_at_its_own_size(tmp_path):
    tiny = Studio("wan2.1-t2v-1.3b-480p", tmp_path, device="cpu", model="tiny")
    generation = tiny.generation(tiny.preset, num_inference_steps=1)
    (*_, clip) = tiny.run({"dense": load_preset("wan2.1-t2v-1.3b-480p/dense")}, generation, "a ball", 0)
    assert clip.frames.shape == (5, 32, 48, 3)


def test_a_preset_that_needs_more_than_a_prompt_is_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"wan2\.1-i2v-14b-480p needs image, which the page does not take"):
        Studio("wan2.1-i2v-14b-480p", tmp_path)
