"""A wheel holds what the packages list names: every folder with Python files must be in it."""

from __future__ import annotations

from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[1]


def test_every_folder_of_python_files_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {"dit_accel"}
    for top in ("dit_accel", "kernels", "pipelines", "presets", "samples"):
        for file in (ROOT / top).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "dit_accel" else ("dit_accel", *parts)))
    assert found == set(settings["packages"])
