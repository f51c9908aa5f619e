"""Fixtures of streams."""

from __future__ import annotations

import sys

import pytest
from stream_cases import SETTINGS, tiny_transformer

from dit_accel.cli import generate
from dit_accel.pipelines.streaming.positions import Rotary


@pytest.fixture(scope="session")
def rotary():
    return Rotary(tiny_transformer(layers=1).rope)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, pipeline_folder):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stream.yaml").write_text(SETTINGS)
    usual = [
        "--stream",
        "--model",
        pipeline_folder,
        "--height",
        "16",
        "--width",
        "24",
        "--stream-settings",
        "stream.yaml",
    ]

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["generate-video", *map(str, [*usual, *arguments])])
        with pytest.raises(SystemExit) as left:
            generate.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, captured.err

    return run
