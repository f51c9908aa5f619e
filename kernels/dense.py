"""Dense attention by the fastest library at hand: what the steps that a schedule keeps dense, and benchmarks, run.

Which one is fastest was measured by others and is stated where it decides; nothing is chosen by its name alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from dit_accel.errors import UnsupportedError, near_matches
from dit_accel.kernels.products import are_wide, wide_products

_HALF = (torch.float16, torch.bfloat16)
_FROM_CUDNN_ON = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
# Queries from which on torch's attention on a CPU works on 256 at a time: in smaller products oneDNN loses its lead.
_LARGE_TILES_FROM = 768


@dataclass(frozen=True)
class DenseBackend:
    """One way to compute dense attention.

    Args:
        run: output `[B, H, Nq, D]` for q, k, v `[B, H, N, D]` and the factor on the logits.
        why_not: None when it can serve these queries, else the reason why not, in one clause.
        is_exact: its result differs from dense attention by rounding alone; "auto" takes no other.
    """

    run: Callable[[Tensor, Tensor, Tensor, float], Tensor]
    why_not: Callable[[Tensor], str | None]
    is_exact: bool = True


def dense_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, backend: str = "auto") -> Tensor:
    """Softmax attention of all queries over all keys.

    Args:
        q, k, v: `[B, H, N, D]`; keys may differ in length from queries.
        scale: factor on the logits. Default 1 / sqrt(D).
        backend: "auto", or a name from `dense_backends`; an explicit one never falls back.

    Returns:
        `[B, H, Nq, D]`.

    Raises:
        UnsupportedError: the backend is unknown or cannot run here; the message says why.
    """
    name = preferred(q) if backend == "auto" else backend
    if name not in _BACKENDS:
        raise UnsupportedError(f"dense_attention: unknown backend {name!r}{near_matches(name, ['auto', *_BACKENDS])}")
    reason = _BACKENDS[name].why_not(q)
    if reason:
        raise UnsupportedError(f"dense_attention: backend {name!r} cannot run this call: {reason}; use 'auto'")
    return _BACKENDS[name].run(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def dense_backends(q: Tensor) -> dict[str, str | None]:
    """For each backend: None when it can serve queries like q `[B, H, N, D]`, else the reason why not."""
    return {name: backend.why_not(q) for name, backend in _BACKENDS.items()}


def exact_backends(q: Tensor) -> list[str]:
    """The usable backends that compute dense attention to rounding, for q `[B, H, N, D]`."""
    return [name for name, backend in _BACKENDS.items() if backend.is_exact and backend.why_not(q) is None]


def preferred(q: Tensor) -> str:
    """What "auto" takes for q `[B, H, N, D]`.

    cuDNN on compute capability 9.x and 10.x: 690 to 700 TFLOP/s at head size 128 on an H200 against 330 for what torch
    takes by itself (NVIDIA's cudnn-frontend results, torch issue 142132). On a CPU with wide products those, from the
    length on at which torch's attention multiplies large tiles (docs/kernels.md). Elsewhere torch's own choice: cuDNN
    was slower than it on A100 and no faster on Ada.
    """
    if not torch.compiler.is_compiling() and q.shape[2] >= _LARGE_TILES_FROM and _BACKENDS["onednn"].why_not(q) is None:
        return "onednn"
    on_descriptors = q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    return "cudnn" if on_descriptors and _BACKENDS["cudnn"].why_not(q) is None else "sdpa"


@contextmanager
def fastest_first(q: Tensor) -> Iterator[None]:
    """Have torch's own attention try first what "auto" takes, for calls inside on queries like q `[B, N, H, D]`.

    Where that kernel cannot serve a call (a mask, an odd head size), torch takes another, as without this.
    """
    name = preferred(q.transpose(1, 2))
    if name == "onednn":
        with wide_products(q.device):
            yield
    elif name == "cudnn":
        with sdpa_kernel(_FROM_CUDNN_ON, set_priority=True):
            yield
    else:
        yield


def _forced(kind: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Torch's attention with one kernel allowed: it raises where that one cannot run."""

    def run(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with sdpa_kernel([kind]):
            return F.scaled_dot_product_attention(q, k, v, scale=scale)

    return run


def _default(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def _wide(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Torch's attention in fp32, with the products of the library that has all of the vector units."""
    with wide_products(q.device):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).to(q.dtype)


def _wide_why_not(q: Tensor) -> str | None:
    if q.device.type != "cpu":
        return f"it is for CPUs, the tensors are on {q.device.type}"
    if q.dtype == torch.float64:
        return "float64 products have one library alone"
    if not are_wide(q.device):
        return "products of oneDNN are not faster than those of torch here"
    return None


def _xformers(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(q, k, v, scale=scale).transpose(1, 2)


def _sage(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    from sageattention import sageattn

    return sageattn(q, k, v, tensor_layout="HND", is_causal=False, sm_scale=scale)


def _needs(package: str | None, largest_head: int) -> Callable[[Tensor], str | None]:
    """A check for CUDA kernels in half precision, with an optional package."""

    def why_not(q: Tensor) -> str | None:
        if package is not None and importlib.util.find_spec(package) is None:
            return f"{package} is not installed"
        if not q.is_cuda:
            return f"it needs a CUDA device, the tensors are on {q.device.type}"
        if q.dtype not in _HALF:
            return f"dtype {q.dtype} is not float16 or bfloat16"
        if q.shape[-1] > largest_head or q.shape[-1] % 8:
            return f"head_dim {q.shape[-1]} is not a multiple of 8 up to {largest_head}"
        return None

    return why_not


def _cudnn_why_not(q: Tensor) -> str | None:
    reason = _needs(None, 128)(q)
    return reason if reason or torch.backends.cudnn.is_available() else "this torch has no cuDNN"


def _efficient_why_not(q: Tensor) -> str | None:
    return None if q.is_cuda else f"it needs a CUDA device, the tensors are on {q.device.type}"


_BACKENDS = {
    "sdpa": DenseBackend(_default, lambda q: None),
    "onednn": DenseBackend(_wide, _wide_why_not),
    "cudnn": DenseBackend(_forced(SDPBackend.CUDNN_ATTENTION), _cudnn_why_not),
    "flash": DenseBackend(_forced(SDPBackend.FLASH_ATTENTION), _needs(None, 256)),
    "efficient": DenseBackend(_forced(SDPBackend.EFFICIENT_ATTENTION), _efficient_why_not),
    "xformers": DenseBackend(_xformers, _needs("xformers", 256)),
    "sage": DenseBackend(_sage, _needs("sageattention", 128), is_exact=False),
}
