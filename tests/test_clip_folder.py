"""Clips that wait for the judge: made once, by one model."""

from __future__ import annotations

import numpy as np
import pytest

from dit_accel.errors import ConfigError
from dit_accel.samples import evaluate_tiny_wan
from dit_accel.samples.clip_folder import ClipFolder, weights_digest
from dit_accel.samples.tiny_random import random_wan_pipeline


def test_a_clip_is_read_as_it_was_written(tmp_path):
    kept, clip = ClipFolder(tmp_path / "a" / "b", {"steps": 3}), np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    assert not kept.has(7)
    kept.keep(7, clip)
    again = ClipFolder(tmp_path / "a" / "b", {"steps": 3})
    assert again.has(7)
    assert not again.has(6)
    assert np.array_equal(again.read(7), clip)
    assert sorted(file.name for file in kept.folder.iterdir()) == ["0007.npz", "made_by.json"]


def test_clips_of_something_else_are_refused(tmp_path):
    ClipFolder(tmp_path, {"steps": 3, "seed": 0, "size": (4, 4)})
    ClipFolder(tmp_path, {"steps": 3, "seed": 0, "size": (4, 4)})
    with pytest.raises(ConfigError, match="clips of another seed, steps; name another folder"):
        ClipFolder(tmp_path, {"steps": 4, "seed": 1, "size": (4, 4)})


def test_two_processes_make_what_is_missing(tmp_path, capsys):
    preset, folder, clips = tmp_path / "mine.yaml", tmp_path / "model", tmp_path / "clips"
    preset.write_text(
        "extends: tiny-wan/dense\n"
        "generation: {height: 16, width: 16, num_frames: 5, num_inference_steps: 1, guidance_scale: 1.0}\n"
    )
    random_wan_pipeline().save_pretrained(folder)
    options = ["--preset", str(preset), "--model", str(folder), "--clips", str(clips), "--num-prompts"]
    evaluate_tiny_wan.main([*options, "1"])
    first = (clips / "0000.npz").stat().st_mtime_ns
    evaluate_tiny_wan.main([*options, "3", "--processes", "2"])
    assert (clips / "0000.npz").stat().st_mtime_ns == first
    assert capsys.readouterr().out.count("| 3 |") == 3
    alone = tmp_path / "alone"
    evaluate_tiny_wan.main([*options[:5], str(alone), "--num-prompts", "3"])
    for name in ("0001.npz", "0002.npz"):
        difference = np.load(clips / name)["clip"].astype(int) - np.load(alone / name)["clip"]
        assert np.abs(difference).max() <= 1  # as many threads make other roundings
    with pytest.raises(ConfigError, match="clips of another seed"):
        evaluate_tiny_wan.main([*options, "1", "--seed", "1"])


def test_the_digest_of_weights_changes_with_them(tmp_path):
    pipe = random_wan_pipeline()
    pipe.save_pretrained(tmp_path / "model")
    before = weights_digest(str(tmp_path / "model"))
    assert weights_digest(str(tmp_path / "model")) == before
    pipe.transformer.proj_out.weight.data[0, 0] += 1
    pipe.save_pretrained(tmp_path / "model")
    assert weights_digest(str(tmp_path / "model")) != before
