"""How a benchmark measures, and how much of a call it can take on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import torch

from dit_accel.bench.shapes import Shape, structured_qkv
from dit_accel.bench.timing import available_bytes, fastest_dense, seconds
from dit_accel.layout import TokenLayout

_PROBE_TOKENS = 2048
TIME_IS_UP = "left out: the time is up"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        device, dtype: where, and in what.
        rounds: interleaved rounds.
        heads: heads to time. Default None: those of the model, or as many as `limit` allows.
        limit: longest dense call in seconds; heads are left out to keep to it. Default 60.
        backend: backend of `block_attention`. Default "auto".
        seed: of the inputs.
        deadline: as `time.monotonic` gives it; what has not begun by then is left out, and its row says so. Default:
            none.
    """

    device: torch.device
    dtype: torch.dtype
    rounds: int = 5
    heads: int | None = None
    limit: float = 60.0
    backend: str = "auto"
    seed: int = 0
    deadline: float | None = None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to begin."""
        return self.deadline is not None and time.monotonic() > self.deadline


def heads_that_fit(shape: Shape, options: Options) -> tuple[int, str]:
    """How many heads to time, and why not all; 0 when not even one fits into time and memory."""
    wanted = options.heads or shape.heads
    one = 4 * shape.layout.tokens * shape.head_dim * options.dtype.itemsize  # q, k, v and the output
    free = available_bytes(options.device)
    fits = wanted if free is None else int(0.5 * free // (2 * one))  # orders and padding copy once
    small = TokenLayout((1, 1, min(_PROBE_TOKENS, shape.layout.tokens)))
    q, k, v = structured_qkv(small, 2, shape.head_dim, options.device, options.dtype)
    _, dense = fastest_dense(q, k, v)
    taken = seconds(partial(dense, q, k, v), options.device) / 2 * (shape.layout.tokens / small.tokens) ** 2
    in_time = int(options.limit // taken)
    heads = min(wanted, fits, in_time)
    if heads < 1:
        what = f"one head takes about {taken:.0f} s" if in_time < 1 else "one head does not fit into memory"
        return 0, f"not timed: {what}"
    return heads, "" if heads == shape.heads else f"{heads} of {shape.heads} heads"
