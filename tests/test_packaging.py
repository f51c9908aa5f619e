"""What installs, and where: the list of packages, and the oldest Python that is promised."""

from __future__ import annotations

import ast
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
TOPS = ("dit_accel", "kernels", "pipelines", "presets", "samples")


def settings() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def oldest(specifiers: SpecifierSet) -> str:
    return next(s.version for s in specifiers if s.operator == ">=")


def test_every_folder_of_python_files_is_in_the_wheel():
    found = {"dit_accel"}
    for top in TOPS:
        for file in (ROOT / top).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT).parts
            found.add(".".join(parts if top == "dit_accel" else ("dit_accel", *parts)))
    assert found == set(settings()["tool"]["setuptools"]["packages"])


def test_the_oldest_python_is_one_that_the_oldest_diffusers_runs_on():
    """Diffusers raised its own to 3.11 in the version that this library needs: pip finds none for an older Python."""
    project = settings()["project"]
    needed = next(r for r in map(Requirement, project["dependencies"]) if r.name == "diffusers")
    if not metadata.version("diffusers").startswith(oldest(needed.specifier)):
        pytest.skip("the installed Diffusers is newer than the oldest that is promised")
    python = oldest(SpecifierSet(project["requires-python"]))
    assert python in SpecifierSet(metadata.metadata("diffusers")["Requires-Python"])


@pytest.mark.parametrize("top", TOPS)
def test_every_file_parses_on_the_oldest_python(top: str):
    version = oldest(SpecifierSet(settings()["project"]["requires-python"])).split(".")
    for file in (ROOT / top).rglob("*.py"):
        ast.parse(file.read_text(encoding="utf-8"), str(file), feature_version=(int(version[0]), int(version[1])))
