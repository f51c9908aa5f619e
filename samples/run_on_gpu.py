"""Check and time every kernel on this machine's GPU: `python samples/run_on_gpu.py`, straight from a clone.

Nothing has to be installed but torch, Triton and NumPy. See docs/gpu.md.
"""

from __future__ import annotations

import sys
from pathlib import Path


def find_package() -> None:
    """In a clone, import `dit_accel` from it: its subpackages are folders beside it, installed or not."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "dit_accel" / "__init__.py").exists():
        return
    sys.path.insert(0, str(root))
    import dit_accel

    # The root also holds folders whose names other packages look for.
    sys.path.remove(str(root))
    if str(root) not in dit_accel.__path__:
        dit_accel.__path__.append(str(root))


if __name__ == "__main__":
    find_package()
    from dit_accel.bench.gpu_run import main

    sys.exit(main([sys.executable, __file__]))
