"""The judge of streams: what counts as kept, and what equal memory is."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.presets import load_preset
from dit_accel.samples import evaluate_stream
from dit_accel.samples.clips import caption, draw_scene, render, render_mask
from dit_accel.samples.evaluate_stream import Variant, kept, table, with_compressed_past
from dit_accel.samples.held_out import held_out_tasks
from dit_accel.samples.judge import describe
from dit_accel.samples.repertoire import BASIC
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.streaming import StreamSettings

SETTINGS = StreamSettings(steps=(1000.0,), chunk=2, window=8, sink=2, positions="reindex", guidance_scale=2.0)


def chunks_of(clip):
    """What each chunk of two latent frames shows; the first has three frames, the others four."""
    return [describe(clip[at and at - 1 : at + 3]) for at in range(0, len(clip), 4)]


def test_a_drawn_stream_keeps_its_object_and_a_changed_one_does_not():
    rng, whole = np.random.default_rng(5), 0
    for _ in range(12):
        scene = draw_scene(rng)
        clip = render(scene, 63, 64, 64, bounces=True)
        whole += kept(chunks_of(clip), 8)
        for name, (one, two) in {"color": ("red", "green"), "shape": ("ball", "cross")}.items():
            other = replace(scene, **{name: two if getattr(scene, name) == one else one})
            found = chunks_of(np.concatenate([clip[:31], render(other, 63, 64, 64, bounces=True)[31:]]))
            assert not kept(found, 16, (name,))
    assert whole >= 9


def test_a_bouncing_object_is_never_off_the_canvas():
    rng = np.random.default_rng(6)
    for _ in range(10):
        scene = draw_scene(rng)
        sizes = render_mask(scene, 200, 48, 64, bounces=True).sum((1, 2))
        assert sizes.min() > 0.8 * sizes.max()
        short = render(scene, 9, 48, 64, bounces=True)
        assert np.array_equal(short, render(scene, 200, 48, 64, bounces=True)[:9])


def test_what_counts_as_kept():
    red, blue, none = ({"color": c, "shape": s} for c, s in (("red", "ball"), ("blue", "ball"), ("none", "none")))
    assert kept([red] * 8, 8)
    assert not kept([*[red] * 7, blue], 8)
    assert kept([*[red] * 7, blue], 8, ("shape",))
    assert kept([*[red] * 7, blue], 7)
    assert not kept([none] * 8, 8)
    # Far from the first chunk the last eight vote.
    assert kept([red, *[blue] * 20, *[red] * 5, *[blue] * 3], 29)
    assert not kept([red, *[blue] * 20, *[red] * 4, *[blue] * 4], 29)


def test_a_compressed_past_takes_no_more_memory_than_the_chunk_it_stands_for(tmp_path):
    pipe = StreamingWanPipeline(**random_wan_pipeline().components)
    pipe.preset = load_preset("tiny-wan").model_copy(
        update={"generation": load_preset("tiny-wan").generation.model_copy(update={"height": 32, "width": 32})}
    )
    grid = pipe._latent_size(32, 32)
    tokens = (grid[0] // 2, grid[1] // 2) if pipe.transformer.config.patch_size[1] == 2 else grid
    whole, small = Variant("whole", SETTINGS), with_compressed_past(SETTINGS, pipe.transformer, tokens, (2, 2))
    assert small.settings.window == 6
    for variant in (whole, small):
        assert len(variant.watch(pipe, "a red ball moving right", 0, 12)) == 12
    assert 0.8 * whole.cache_bytes < small.cache_bytes <= whole.cache_bytes
    lines = table([whole, small], held_out_tasks(BASIC, 1, Canvas(9, 32, 32), 0), [8, 12])
    assert [line.count("|") for line in lines] == [12] * 4
    with pytest.raises(ValueError, match="window"):
        with_compressed_past(SETTINGS.model_copy(update={"window": 4}), pipe.transformer, tokens, (2, 2))


def test_the_script_prints_its_table_with_the_environment(tmp_path, capsys):
    folder = tmp_path / "model"
    random_wan_pipeline().save_pretrained(folder)
    preset = tmp_path / "mine.yaml"
    preset.write_text(
        "extends: tiny-wan/dense\ngeneration: {height: 32, width: 32}\n"
        "stream: {steps: [1000.0], chunk: 2, window: 8, sink: 2, guidance_scale: 1.0}\n"
    )
    output = tmp_path / "found.json"
    options = ["--preset", str(preset), "--model", str(folder), "--num-prompts", "2", "--marks", "3", "2"]
    options += ["--processes", "2"]
    evaluate_stream.main([*options, "--output", str(output)])
    out = capsys.readouterr().out
    assert "torch" in out
    assert out.splitlines()[-1].startswith("| sink 2, window 8 |")
    rng = np.random.default_rng(99)
    assert caption(draw_scene(rng, held_out=True), rng) in out
    (found,) = json.loads(output.read_text())["found"].values()
    assert [len(shown) for shown in found] == [3, 3]
    with pytest.raises(SystemExit):
        evaluate_stream.main(["--num-prompts", "1", "--processes", "2"])
    assert "expected 1 to 1, one per prompt, got 2" in capsys.readouterr().err
