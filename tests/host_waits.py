"""Tensors without memory stand for those of a GPU, and whatever would make the host wait for the device raises."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.kernels import operations, triton_launch
from dit_accel.kernels.aot_cases import Launch, recording

_ATEN = torch.ops.aten
# Their result, or its shape, has to be known on the host.
_ASKS = {
    _ATEN._local_scalar_dense,
    _ATEN.nonzero,
    _ATEN.equal,
    _ATEN.is_nonzero,
    _ATEN.masked_select,
    _ATEN.unique_dim,
    _ATEN._unique2,
    _ATEN.repeat_interleave,
    _ATEN.bincount,
}


class HostWait(Exception):
    """What the host would have to wait for."""


class NoWaits(TorchDispatchMode):
    """Raises `HostWait` where a number is asked of the device, or memory that is not page-locked is copied to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        packet = func.overloadpacket
        if packet in _ASKS and any(_is_there(x) for x in given):
            raise HostWait(f"{packet} asks the device")
        if packet in (_ATEN.index, _ATEN.index_put, _ATEN.index_put_) and _is_there(args[0]):
            places = [x for x in args[1] if isinstance(x, Tensor)]
            if any(x.dtype == torch.bool for x in places):
                raise HostWait(f"{packet} by a mask asks how many are true")
            if any(not _is_there(x) for x in places):
                raise HostWait(f"{packet} takes its index from the host")
        out = func(*args, **kwargs)
        if packet is _ATEN._to_copy and _is_there(out) and not _is_there(args[0]) and not kwargs.get("non_blocking"):
            raise HostWait("a tensor of the host is copied from memory that is not page-locked")
        if packet is _ATEN.copy_ and _is_there(args[0]) and not _is_there(args[1]) and args[1].ndim:
            raise HostWait("a tensor of the host is copied into one of the device")
        return out


def _is_there(x: Any) -> bool:
    return isinstance(x, Tensor) and x.device.type == "meta"


_MADE = torch.tensor


def _tensor(data: Any, **options: Any) -> Tensor:
    """`torch.tensor`, whose copy to a device no mode sees."""
    if torch.device(options.get("device") or "cpu").type == "meta":
        raise HostWait("numbers of the host are written on the device")
    return _MADE(data, **options)


@contextmanager
def device_without_memory(monkeypatch: Any) -> Iterator[list[Launch]]:
    """Triton kernels are recorded, and nothing inside may make the host wait; random numbers need no generator."""
    from dit_accel.methods import asa, psa, svg2
    from dit_accel.orders import content, ordering
    from dit_accel.selection import choose

    monkeypatch.setattr(triton_launch, "_architecture", lambda device: 90)
    monkeypatch.setattr(operations, "why_not", lambda *arguments: None)
    monkeypatch.setattr(torch, "tensor", _tensor)
    for module in (asa, psa, svg2, content, ordering, choose):
        # The generator would be the device's own, and a tensor without memory has none.
        monkeypatch.setattr(module, "generator_for", lambda device, *key: None)
    with recording() as launches, NoWaits():
        yield launches
