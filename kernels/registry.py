"""The table of backends of `block_attention`, each with a check that returns a reason instead of a mere no."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dit_accel.errors import UnsupportedError, near_matches
from dit_accel.kernels.spec import Remainder
from dit_accel.plan import BlockPlan


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend, without its data.

    Args:
        device: where q, k, v live.
        dtype: their dtype.
        head_dim: D.
        has_predicate: the plan has partial blocks.
        remainder: see `Remainder`; None drops.
        return_lse: the log-sum-exp is wanted too.
        is_uniform: all blocks of queries and of keys have one length but the last.
        q_size: block size of the queries.
        k_size: block size of the keys.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    has_predicate: bool = False
    remainder: Remainder | None = None
    return_lse: bool = False
    is_uniform: bool = True
    q_size: int = 64
    k_size: int = 64


class BackendFunction(Protocol):
    """What a backend implements; see `dit_accel.kernels.block_attention` for the meaning of the arguments."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: BlockPlan,
        *,
        scale: float,
        remainder: Remainder | None,
        kv_len: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Return the output `[B, H, Nq, D]` and the log-sum-exp, fp32 (fp64 for fp64 inputs) `[B, H, Nq]`."""


@dataclass(frozen=True)
class Backend:
    """One way to compute `block_attention`.

    Args:
        name: how the user asks for it.
        run: the implementation.
        why_not: returns None when it can serve the request, else the reason why not, in one clause.
        priority: "auto" takes the usable backend with the highest; below 0 it is never taken unasked.
        break_even: above this density dense attention is faster on this backend's usual device.
    """

    name: str
    run: BackendFunction
    why_not: Callable[[Request], str | None]
    priority: int
    break_even: float


_BACKENDS: dict[str, Backend] = {}
_DISABLED: dict[tuple[str, str, torch.dtype, int], str] = {}


def register_backend(backend: Backend) -> None:
    """Enter a backend into the table; a second entry under the same name replaces the first."""
    _BACKENDS[backend.name] = backend


def disable_backend(name: str, request: Request, reason: str) -> None:
    """Bar a backend for this (device type, dtype, head size), as the self-test does when it finds it wrong."""
    _DISABLED[name, request.device.type, request.dtype, request.head_dim] = reason


def why_not(backend: Backend, request: Request) -> str | None:
    """The reason why `backend` cannot serve `request`, or None when it can."""
    barred = _DISABLED.get((backend.name, request.device.type, request.dtype, request.head_dim))
    return barred or backend.why_not(request)


def backends(request: Request | None = None) -> dict[str, str | None]:
    """For each backend: None when it is usable for `request`, else the reason why not.

    Args:
        request: default: fp32 on the CPU (bf16 on CUDA where there is one) with head_dim 64.
    """
    if request is None:
        cuda = torch.cuda.is_available()
        request = Request(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32, 64)
    return {name: why_not(backend, request) for name, backend in sorted(_BACKENDS.items())}


def choose_backend(name: str, request: Request) -> Backend:
    """The backend called `name`, or for "auto" the usable one with the highest priority.

    Raises:
        UnsupportedError: an explicit backend cannot serve the request (it never falls back silently), no backend
            can, or the name is unknown. The message gives every reason.
    """
    if name != "auto":
        if name not in _BACKENDS:
            raise UnsupportedError(f"backend: unknown backend {name!r}{near_matches(name, ['auto', *_BACKENDS])}")
        reason = why_not(_BACKENDS[name], request)
        if reason:
            raise UnsupportedError(f"backend {name!r} cannot run this call: {reason}; use backend='auto' or another")
        return _BACKENDS[name]
    reasons = {b.name: why_not(b, request) for b in _BACKENDS.values() if b.priority >= 0}
    usable = [_BACKENDS[n] for n, reason in reasons.items() if reason is None]
    if not usable:
        raise UnsupportedError("no backend can run this call: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))
    return max(usable, key=lambda b: b.priority)
