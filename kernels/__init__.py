"""The arithmetic: `block_attention` and its backends. Imports `dit_accel.plan` and nothing else of the library."""

from dit_accel.kernels import flex_backend, reference, torch_backend, triton_backend
from dit_accel.kernels.attention import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.kernels.registry import Backend, backends, register_backend
from dit_accel.kernels.spec import Precision, Remainder

for _backend in (reference.BACKEND, torch_backend.BACKEND, triton_backend.BACKEND, flex_backend.BACKEND):
    register_backend(_backend)

__all__ = ["Backend", "Precision", "Remainder", "backends", "block_attention", "merge", "register_backend"]
