"""The example scripts in `samples/` run."""

from __future__ import annotations

import imageio.v2 as imageio

from dit_accel.samples import example_accelerate, example_stream
from dit_accel.samples.demo_screenshots import FOLDER

SMALL = ["--size", "32"]


def test_dense_and_accelerated_are_compared(tmp_path, capsys):
    target = tmp_path / "o.mp4"
    example_accelerate.main([*SMALL, "--frames", "5", "--steps", "5", "--output", str(target)])
    assert len(imageio.mimread(target)) == 5
    said = capsys.readouterr().out
    assert "method radial" in said
    assert "PSNR" in said


def test_a_stream_changes_its_prompt(tmp_path, capsys):
    example_stream.main([*SMALL, "--chunks", "2", "--output", str(tmp_path / "o.mp4")])
    assert len(imageio.mimread(tmp_path / "o.mp4")) > 3
    assert "chunk 2 of 2" in capsys.readouterr().out


def test_pictures_of_the_readme_are_small(request):
    pictures = sorted((request.config.rootpath / FOLDER).glob("demo-*.png"))
    assert [picture.stem for picture in pictures] == ["demo-generate", "demo-methods", "demo-report", "demo-stream"]
    assert all(picture.stat().st_size < 300_000 for picture in pictures)
