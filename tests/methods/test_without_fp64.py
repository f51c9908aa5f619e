"""No method computes in fp64 on a device that has none (Apple's GPUs); here the CPU stands for one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from method_cases import attend, tensors
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel import widest
from dit_accel.error_estimate import estimate_error, sample_rows
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods
from dit_accel.pipelines.streaming.ladder import Ladder
from dit_accel.plan import BlockPlan
from dit_accel.reuse import overlap
from dit_accel.state import CallContext

# Numbers that are made on the CPU whatever the device, and moved to it in fp32 or as indices.
ON_THE_CPU = {"sampling.py", "space.py", "xattention.py"}
LAYOUT = TokenLayout((3, 8, 6), 9, "after", (150, 153))


class NoDoubles(TorchDispatchMode):
    """Refuses every operation of the library whose result is fp64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket not in (torch.ops.aten.rand, torch.ops.aten.scalar_tensor) and any(
            isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(out)
        ):
            frame = sys._getframe(1)
            while frame is not None and "dit_accel" not in frame.f_code.co_filename:
                frame = frame.f_back
            place = Path("test" if frame is None else frame.f_code.co_filename)
            assert place.name in ON_THE_CPU, f"{place}:{frame and frame.f_lineno}: {func} makes fp64"
        return out


@pytest.fixture(autouse=True)
def no_fp64(monkeypatch):
    monkeypatch.setattr(widest, "_WITHOUT_FP64", ("mps", "cpu"))


@pytest.mark.parametrize("name", list_methods())
def test_methods(name):
    cls = type(get_method(name))
    density = {"density": 0.4} if "density" in cls.model_fields else {}
    q, k, v = tensors(LAYOUT, batch=2, heads=4)
    call = CallContext(LAYOUT)
    with NoDoubles():
        method = get_method(name, **density)
        out = attend(method, LAYOUT, q, k, v, call=call)
        assert method.plan(LAYOUT, q, k, v, CallContext(LAYOUT))[1].density_per_head().dtype == torch.float32
    assert out.isfinite().all()


def test_what_the_engine_does_beside_methods():
    q, k, v = tensors(LAYOUT, batch=2)
    plan: BlockPlan = get_method("composed", density=0.4).plan(LAYOUT, q, k)[1]
    with NoDoubles():
        assert float(overlap(plan, plan)) == 1
        lengths = (150, 153)
        error = estimate_error(q, k, v, v, *sample_rows(v, lengths, 16, 0), lengths)
        ladder, x = Ladder((900.0, 500.0)), torch.randn(2, 3)
        assert ladder.noisy(ladder.clean(x, x, 0), x, 1).shape == ladder.euler(x, x, 0).shape
    assert error.isfinite().all()


def test_fp64_is_noticed():
    with NoDoubles(), pytest.raises(AssertionError, match="makes fp64"):
        torch.ones(3).double()
