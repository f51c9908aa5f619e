"""Delegates to libraries: FlexAttention over the lists of a plan, and the dense backends."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from kernel_cases import random_plan, tensors, uniform, use_library
from torch.nn import functional as F
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

from dit_accel import engine
from dit_accel.errors import UnsupportedError
from dit_accel.kernels import Precision, Remainder, backends, block_attention, dense, flex_backend
from dit_accel.kernels.dense import dense_attention, dense_backends, exact_backends, preferred
from dit_accel.kernels.registry import Request
from dit_accel.methods.registry import get_method
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

CUDA = Request(torch.device("cuda"), torch.bfloat16, 64, q_size=128, k_size=64)


@pytest.mark.parametrize("kv_len", [None, (128, 70), (128, 16)])
@pytest.mark.parametrize("axes", [(1, 1), (2, 2)])
def test_the_mask_of_flex_says_the_same_as_the_lists(kv_len, axes):
    """Its eager form reads the mask alone: that it agrees shows that a silent fallback stays right."""
    q, k, v = (x.float() for x in tensors(batch=2, queries=128))
    plan = random_plan(*uniform(128, 16), axes=axes)
    length = None if kv_len is None else torch.tensor(kv_len)
    got = flex_backend.attend(q, k, v, plan, 0.25, length, flex_attention)
    wanted = block_attention(q, k, v, plan, scale=0.25, kv_len=length, return_lse=True, backend="torch")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_lists_of_flex_are_those_of_the_plan():
    plan = random_plan(*uniform(128, 16))
    mask = flex_backend.block_mask(plan, 1, 2, None)
    assert torch.equal(mask.to_dense().bool(), plan.to_mask().expand(1, 2, 8, 8))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"device": torch.device("cpu")}, "only its compiled form skips blocks"),
        ({"remainder": Remainder()}, "no remainder"),
        ({"precision": Precision("int8")}, "neither quantises nor skips"),
        ({"has_predicate": True}, "only whole blocks"),
        ({"is_uniform": False}, "only whole blocks"),
        ({"k_size": 32}, "multiple of 128 x 64 tokens"),
    ],
)
def test_flex_says_why_not(changed, words):
    assert backends(CUDA)["flex"] is None
    assert words in backends(replace(CUDA, **changed))["flex"]


def test_an_explicit_backend_never_falls_back():
    q, k, v = (x.float() for x in tensors(queries=32))
    plan = random_plan(*uniform(32, 16))
    for name in ("flex", "triton"):
        with pytest.raises(UnsupportedError, match=f"backend '{name}' cannot run this call"):
            block_attention(q, k, v, plan, backend=name)
    for name in ("cudnn", "flash", "xformers", "sage"):
        with pytest.raises(UnsupportedError, match=f"backend '{name}' cannot run this call"):
            dense_attention(q, k, v, backend=name)
    with pytest.raises(UnsupportedError, match="unknown backend 'cudn'; did you mean 'cudnn'"):
        dense_attention(q, k, v, backend="cudn")


def allowed():
    """Which kernels torch's attention may take now, the first to be tried first."""
    order = torch._C._get_sdp_priority_order()
    flags = torch.backends.cuda
    on = {
        SDPBackend.CUDNN_ATTENTION: flags.cudnn_sdp_enabled(),
        SDPBackend.FLASH_ATTENTION: flags.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: flags.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: flags.math_sdp_enabled(),
    }
    return [SDPBackend(n) for n in order if on.get(SDPBackend(n))]


def test_dense_steps_try_the_fastest_kernel_first_and_leave_no_trace(monkeypatch):
    q, k, v = (x.float() for x in tensors(queries=40))
    before = allowed()
    with dense.fastest_first(q):
        assert allowed() == before
    monkeypatch.setattr(dense, "preferred", lambda q: "cudnn")
    mask = torch.rand(40, 40, generator=torch.Generator().manual_seed(0)) < 0.5
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with dense.fastest_first(q):
        assert allowed()[0] == SDPBackend.CUDNN_ATTENTION
        assert set(allowed()) == set(before)
        # What that kernel cannot serve is still served.
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=mask), wanted)
    assert allowed() == before


@pytest.mark.parametrize(("method", "inside"), [("radial", True), ("dense", False)])
def test_the_engine_runs_dense_steps_so_but_leaves_a_dense_method_alone(monkeypatch, method, inside):
    entered = []

    @contextmanager
    def watched(q):
        entered.append(q.shape)
        yield

    monkeypatch.setattr(engine, "fastest_first", watched)
    layers = [torch.nn.Identity()]
    machine = engine.Engine(get_method(method), Schedule.make(dense_layers=[(0, 1)]), layers)
    machine.begin(RunState((2, 4, 4), 0, 0.5))
    q = torch.zeros(1, 32, 2, 8)
    machine.attend(layers[0], q, q, q, dense=lambda: q)
    assert len(entered) == inside


def test_dense_attention_here_is_that_of_torch(monkeypatch):
    use_library(monkeypatch, "blas")
    q, k, v = (x.float() for x in tensors(queries=40, keys=60))
    assert preferred(q) == "sdpa"
    assert exact_backends(q) == ["sdpa"]
    assert dense_backends(q)["sdpa"] is None
    assert "not faster" in dense_backends(q)["onednn"]
    torch.testing.assert_close(dense_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(dense_attention(q, k, v, scale=0.5), F.scaled_dot_product_attention(q, k, v, scale=0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (67, 130), (769, 65)])
def test_dense_attention_by_wide_products(monkeypatch, dtype, queries, keys):
    use_library(monkeypatch, "onednn")
    q, k, v = (x.to(dtype) for x in tensors(queries=queries, keys=keys, dim=40))
    assert exact_backends(q) == ["sdpa", "onednn"]
    assert preferred(q) == ("onednn" if queries >= 768 else "sdpa")
    exact = dense_attention(*(x.double() for x in (q, k, v)), backend="sdpa")
    budget = 2 * (dense_attention(q, k, v, backend="sdpa") - exact).abs().max() + 1e-6
    got = dense_attention(q, k, v, backend="onednn")
    assert got.dtype == dtype
    assert (got - exact).abs().max() <= budget
    assert "one library" in dense_backends(q.double())["onednn"]
    assert "for CPUs" in dense_backends(q.to("meta"))["onednn"]


def test_dense_steps_on_a_cpu_multiply_widely(monkeypatch):
    entered = []

    @contextmanager
    def watched(device):
        entered.append(device.type)
        yield

    use_library(monkeypatch, "onednn")
    monkeypatch.setattr(dense, "wide_products", watched)
    for tokens, times in ((767, 0), (768, 1)):
        with dense.fastest_first(torch.zeros(1, tokens, 2, 8)):
            assert len(entered) == times
