"""These tests run in Triton's interpreter, in a process of their own; see `tests/kernels/test_interpreter.py`."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_accel.kernels import register_backend, triton_backend

torch.set_num_threads(1)
# Every case is compared with the reference anyway; the self-test has a test of its own.
register_backend(replace(triton_backend.BACKEND, needs_self_test=False))
if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the variable when it is imported, so a process that has kernels compiled cannot switch.
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def right_float8(monkeypatch):
    """Conversions of e4m3 as a GPU makes them: those of the interpreter lose a bit where the mantissa overflows."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(x, source, target, mode):
        if tl.float8e4nv not in (source, target):
            return convert(x, source, target, mode)
        if target == tl.float8e4nv:
            return torch.from_numpy(x.astype(np.float32)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        wide = torch.from_numpy(x).view(torch.float8_e4m3fn).float().numpy()
        return wide.astype(np.float16).view(np.uint16) if target == tl.float16 else wide.view(np.uint32)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(triton_backend, "_why_no_fp8", lambda device: None)
