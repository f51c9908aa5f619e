"""The self-test of backends, and how the table chooses after one failed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import random_plan, tensors, uniform

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import (
    Backend,
    Precision,
    Remainder,
    backends,
    block_attention,
    register_backend,
    registry,
    torch_backend,
)
from dit_accel.kernels.registry import Request, choose_backend
from dit_accel.kernels.selftest import fault_of

REQUEST = Request(torch.device("cpu"), torch.float32, 16, q_size=16, k_size=16)


def wrong_block(q, k, v, call):
    """Attends the block after the one selected."""
    shifted = replace(call.plan, indices=(call.plan.indices + 1) % call.plan.k_blocks.count)
    return torch_backend.run(q, k, v, replace(call, plan=shifted))


def forgets_padding(q, k, v, call):
    return torch_backend.run(q, k, v, replace(call, kv_len=None))


def scaled_lse(*arguments):
    out, lse = torch_backend.run(*arguments)
    return out, lse / 0.6931


def not_a_number(*arguments):
    out, lse = torch_backend.run(*arguments)
    return out * torch.nan, lse


def flat(*arguments):
    out, lse = torch_backend.run(*arguments)
    return out.flatten(2), lse


def crashes(*arguments):
    raise RuntimeError("no kernel image\nis available")


@pytest.fixture
def table(monkeypatch):
    """The table of backends, put back afterwards."""
    for name in ("_BACKENDS", "_DISABLED", "_TESTED"):
        monkeypatch.setattr(registry, name, type(getattr(registry, name))(getattr(registry, name)))
    return registry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rest", [None, Remainder("diagonal", "global")])
@pytest.mark.parametrize("precision", [None, Precision("int8")])
def test_a_right_backend_passes(dtype, rest, precision):
    request = replace(REQUEST, dtype=dtype, remainder=rest, precision=precision, q_size=32)
    assert fault_of(torch_backend.BACKEND, request) is None


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (wrong_block, "output is off by"),
        (forgets_padding, "output is off by"),
        (scaled_lse, "log-sum-exp is off by"),
        (not_a_number, "output is off by nan"),
        (flat, "of shape"),
        (crashes, "RuntimeError: no kernel image$"),
    ],
)
def test_a_wrong_backend_is_disabled_with_the_reason(table, run, words):
    register_backend(Backend("broken", run, lambda request: None, priority=9, break_even=1.0))
    assert choose_backend("auto", REQUEST).name == "torch"
    with pytest.raises(UnsupportedError, match=r"backend 'broken' cannot run this call: its self-test"):
        choose_backend("broken", REQUEST)
    with pytest.raises(AssertionError):
        assert backends(REQUEST)["broken"] is None
    import re

    assert re.search(words, backends(REQUEST)["broken"])


def test_it_runs_once_per_device_dtype_and_head_size(table):
    calls = []

    def counted(*arguments):
        calls.append(arguments[0].shape[-1])
        return torch_backend.run(*arguments)

    register_backend(Backend("counted", counted, lambda request: None, priority=9, break_even=1.0))
    for _ in range(3):
        assert choose_backend("auto", REQUEST).name == "counted"
        assert choose_backend("auto", replace(REQUEST, head_dim=8)).name == "counted"
    assert calls == [16, 8]
    q, k, v = (x.float() for x in tensors(queries=40))
    block_attention(q, k, v, random_plan(*uniform(40, 16)))
    assert calls == [16, 8, 16]


def test_a_disabled_size_does_not_disable_the_others(table):
    def wrong_at_eight(q, k, v, call):
        return (wrong_block if q.shape[-1] == 8 else torch_backend.run)(q, k, v, call)

    register_backend(Backend("partly", wrong_at_eight, lambda request: None, priority=9, break_even=1.0))
    assert choose_backend("auto", replace(REQUEST, head_dim=8)).name == "torch"
    assert choose_backend("auto", REQUEST).name == "partly"


def test_the_random_numbers_of_the_caller_are_left_alone():
    state = torch.get_rng_state()
    fault_of(torch_backend.BACKEND, REQUEST)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("culprit", ["the backend", "what it is compared with"])
def test_a_test_that_is_cut_short_counts_for_nothing(table, monkeypatch, culprit):
    """No memory left says nothing about a backend: it is neither trusted untested nor barred for good."""
    from dit_accel.kernels import selftest

    full, seen, computed = [True], [], torch_backend.run

    def run(*arguments):
        seen.append(kind_is_trusted())
        if full[0] and culprit == "the backend":
            raise torch.OutOfMemoryError("no memory")
        return computed(*arguments)

    def compared(*arguments):
        if full[0] and culprit != "the backend":
            raise torch.OutOfMemoryError("no memory")
        return computed(*arguments)

    def kind_is_trusted():
        return registry._kind("narrow", REQUEST) in registry._TESTED

    register_backend(Backend("narrow", run, lambda request: None, priority=9, break_even=1.0))
    monkeypatch.setattr(selftest.torch_backend, "run", compared)
    with pytest.raises(torch.OutOfMemoryError):
        choose_backend("auto", REQUEST)
    assert not kind_is_trusted()
    full[0] = False
    assert choose_backend("auto", REQUEST).name == "narrow"
    assert kind_is_trusted()
    assert not any(seen)  # a backend is not trusted while its test runs
