"""Run the tests of `interpreted/` in processes of their own, where Triton is imported as an interpreter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MODULES = sorted(path.name for path in (HERE / "interpreted").glob("test_*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_the_kernels_are_right_in_the_interpreter(module):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "interpreted" / module)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]
    summary = child.stdout.strip().splitlines()[-1]
    assert re.search(r"\d+ passed", summary), summary
    assert not re.search(r"skipped|xfailed", summary), summary
