"""The table of backends of `block_attention`, each with a check that returns a reason instead of a mere no."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dit_accel.errors import ConfigError, UnsupportedError, near_matches
from dit_accel.kernels.spec import AttentionCall, Precision, Remainder


@dataclass(frozen=True)
class Request:
    """What one call asks of a backend, without its data.

    Args:
        device: where q, k, v live.
        dtype: their dtype.
        head_dim: D.
        has_predicate: the plan has partial blocks.
        has_ball: they are cut by a ball.
        remainder: see `Remainder`; None drops.
        return_lse: the log-sum-exp is wanted too.
        precision: see `Precision`; None is that of the inputs.
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
    precision: Precision | None = None
    is_uniform: bool = True
    q_size: int = 64
    k_size: int = 64
    has_ball: bool = False


class BackendFunction(Protocol):
    """What a backend implements."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, call: AttentionCall) -> tuple[Tensor, Tensor]:
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
        needs_self_test: compare it with the `torch` backend on its first use of each kind (device type, dtype, head
            size, remainder, precision, predicate, block sizes: each is another compilation), and disable it there when
            it is wrong. Default True; False for plain PyTorch code.
    """

    name: str
    run: BackendFunction
    why_not: Callable[[Request], str | None]
    priority: int
    break_even: float
    needs_self_test: bool = True


_BACKENDS: dict[str, Backend] = {}
_DISABLED: dict[tuple[Hashable, ...], str] = {}
_TESTED: set[tuple[Hashable, ...]] = set()
_LARGEST_TILE = 128


def register_backend(backend: Backend) -> None:
    """Enter a backend into the table; a second entry under the same name replaces the first, and its test results."""
    _BACKENDS[backend.name] = backend
    for key in [key for key in _TESTED | set(_DISABLED) if key[0] == backend.name]:
        _TESTED.discard(key)
        _DISABLED.pop(key, None)


def disable_backend(name: str, request: Request, reason: str) -> None:
    """Bar a backend for calls of this kind, as the self-test does when it finds it wrong."""
    _DISABLED[_kind(name, request)] = reason


def _kind(name: str, request: Request) -> tuple[Hashable, ...]:
    """What a self-test stands for: the calls that run the same compiled kernel."""
    sizes = tuple(min(1 << (size - 1).bit_length(), _LARGEST_TILE) for size in (request.q_size, request.k_size))
    device = (request.device.type, request.dtype, request.head_dim)
    return (
        name,
        *device,
        request.remainder,
        request.precision,
        request.has_predicate,
        request.has_ball,
        request.is_uniform,
        *sizes,
    )


def why_not(backend: Backend, request: Request) -> str | None:
    """The reason why `backend` cannot serve `request`, or None when it can."""
    return _DISABLED.get(_kind(backend.name, request)) or backend.why_not(request)


def backends(request: Request | None = None) -> dict[str, str | None]:
    """For each backend: None when it is usable for `request`, else the reason why not.

    Args:
        request: default: fp32 on the CPU (bf16 on CUDA where there is one) with head_dim 64.
    """
    if request is None:
        cuda = torch.cuda.is_available()
        request = Request(torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else torch.float32, 64)
    return {name: why_not(backend, request) for name, backend in sorted(_BACKENDS.items())}


def check_backend(name: str) -> str:
    """Refuse a name that is neither "auto" nor one of `backends()`; returns it.

    Raises:
        ConfigError: unknown name; the message offers near matches.
    """
    if name != "auto" and name not in _BACKENDS:
        raise ConfigError("backend", f"unknown backend {name!r}{near_matches(name, ['auto', *_BACKENDS])}")
    return name


def why_none(name: str, request: Request) -> str | None:
    """Why neither the backend called `name` nor, for "auto", any that it takes can serve `request`; None: one can.

    Nothing is computed, so a backend that its self-test will disable still counts.
    """
    names = [name] if name != "auto" else [one.name for one in _BACKENDS.values() if one.priority >= 0]
    reasons = {one: why_not(_BACKENDS[one], request) for one in names}
    return None if None in reasons.values() else "; ".join(f"{one}: {reason}" for one, reason in reasons.items())


def choose_backend(name: str, request: Request) -> Backend:
    """The backend called `name`, or for "auto" the usable one with the highest priority.

    A backend that fails its self-test is disabled on the way: "auto" then takes the next one.

    Raises:
        ConfigError: the name is unknown.
        UnsupportedError: an explicit backend cannot serve the request (it never falls back silently), or no backend
            can. The message gives every reason.
    """
    if check_backend(name) != "auto":
        reason = why_not(_BACKENDS[name], request) or _self_test(_BACKENDS[name], request)
        if reason:
            raise UnsupportedError(f"backend {name!r} cannot run this call: {reason}; use backend='auto' or another")
        return _BACKENDS[name]
    reasons = {}
    for backend in sorted(_BACKENDS.values(), key=lambda b: -b.priority):
        if backend.priority >= 0:
            reason = why_not(backend, request) or _self_test(backend, request)
            if reason is None:
                return backend
            reasons[backend.name] = reason
    raise UnsupportedError("no backend can run this call: " + "; ".join(f"{n}: {r}" for n, r in reasons.items()))


def _self_test(backend: Backend, request: Request) -> str | None:
    """Test `backend` on its first use for calls of this kind; the reason why it was disabled.

    Raises:
        Exception: the test could not be run to its end, for lack of memory for example; the next call runs it again.
    """
    kind = _kind(backend.name, request)
    if not backend.needs_self_test or kind in _TESTED:
        return None
    # Imported here because the test runs the torch backend, which is itself entered in this table.
    from dit_accel.kernels.selftest import fault_of

    fault = fault_of(backend, request)
    if fault is not None:
        disable_backend(backend.name, request, fault)
    # Last: a test that did not come to an end is run again, and no other thread takes a backend before its verdict.
    _TESTED.add(kind)
    return fault
