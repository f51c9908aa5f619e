"""These tests run in Triton's interpreter, in a process of their own; see `tests/kernels/test_interpreter.py`."""

import os

import torch

torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") != "1":
    # Triton reads the variable when it is imported, so a process that has kernels compiled cannot switch.
    collect_ignore_glob = ["test_*.py"]
