"""These tests run in Triton's interpreter, in a process of their own; see `tests/kernels/test_interpreter.py`."""

import os
from dataclasses import replace

import torch

from dit_accel.kernels import register_backend, triton_backend

torch.set_num_threads(1)
# Every case is compared with the reference anyway; the self-test has a test of its own.
register_backend(replace(triton_backend.BACKEND, needs_self_test=False))
if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the variable when it is imported, so a process that has kernels compiled cannot switch.
    collect_ignore_glob = ["test_*.py"]
