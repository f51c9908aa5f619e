"""The page on architecture names modules that exist, and imports point the way it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
KERNELS_MAY = {"plan", "errors", "widest", "kernels"}


def test_every_module_that_is_named_exists():
    named = set(re.findall(r"[`(]([a-z_]+(?:/[a-z_]+)*\.py)`", PAGE))
    assert len(named) > 30
    known = {str(path.relative_to(ROOT)) for path in ROOT.rglob("*.py") if ".venv" not in path.parts}
    missing = {name for name in named if not any(path == name or path.endswith("/" + name) for path in known)}
    assert not missing


def test_kernels_import_no_policy():
    """As the page says: `plan`, `errors` and `widest`, and what those need."""
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = [node.module]
            elif isinstance(node, ast.Import):
                modules = [name.name for name in node.names]
            for module in modules:
                first, *rest = module.split(".")
                assert first != "dit_accel" or rest[:1] == [] or rest[0] in KERNELS_MAY, f"{path.name}: {module}"


def test_no_family_names_a_method_and_no_method_a_family():
    for here, there in (("families", "dit_accel.methods."), ("methods", "dit_accel.families")):
        for path in (ROOT / "dit_accel" / here).glob("*.py"):
            names = re.findall(r"^(?:from|import) (\S+)", path.read_text(), re.MULTILINE)
            assert not [name for name in names if name.startswith(there) and not name.endswith((".base", ".registry"))]
