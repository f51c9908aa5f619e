"""Products with the rows of a matrix: the same numbers by every library."""

from __future__ import annotations

import threading

import pytest
import torch
from kernel_cases import use_library

from dit_accel.errors import ConfigError
from dit_accel.kernels import products
from dit_accel.kernels.products import KeyMatrix
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method


@pytest.fixture(params=[1, 10**12], ids=["large", "small"])
def limit(request, monkeypatch):
    """Every product counts as large, or none does."""
    monkeypatch.setattr(products, "_LARGE", request.param)


@pytest.mark.usefixtures("limit")
@pytest.mark.parametrize("shape", [(7, 5, 3), (33, 130, 64), (1, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_those_of_the_definition(shape, dtype):
    m, n, size = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 3, m, size, generator=generator, dtype=dtype)
    keys = torch.randn(2, 3, size, n, generator=generator, dtype=dtype).transpose(-1, -2)  # not contiguous
    bias = torch.randn(2, 1, 1, n, generator=generator, dtype=dtype)
    bias[..., 0] = -torch.inf
    exact = (rows.double().unsqueeze(-2) * keys.double().unsqueeze(-3)).sum(-1)
    torch.testing.assert_close(KeyMatrix(keys).times(rows), exact.to(dtype), atol=1e-5, rtol=1e-5)
    matrix = KeyMatrix(keys, bias)
    expected = (exact + bias).to(dtype)
    for part in (slice(0, m), slice(m // 2, m)):  # the same matrix serves several groups of rows
        torch.testing.assert_close(matrix.times(rows[:, :, part]), expected[:, :, part], atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("limit")
def test_products_are_not_rounded_and_pass_no_gradient():
    rows = torch.full((1, 4, 64), 1 + 2**-12, requires_grad=True)
    found = KeyMatrix(torch.ones(1, 4, 64)).times(rows)
    assert torch.equal(found, torch.full((1, 4, 4), 64 + 2**-6))
    assert not found.requires_grad


def test_without_the_library_the_same_blocks_are_chosen(monkeypatch):
    monkeypatch.setattr(products, "_LARGE", 1)
    layout = TokenLayout((4, 8, 8), 9, "after", (260,))
    q, k = torch.randn(2, 1, 2, layout.tokens, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    names = ("xattention", "subblock", "asa", "psa", "proxyattn", "adaspa")
    first, second = [], []
    for plans, name in ((first, "onednn"), (second, "blas")):
        use_library(monkeypatch, name)
        plans += [get_method(name, block=16, density=0.3).plan(layout, q, k)[1].to_mask() for name in names]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def chosen(monkeypatch, wanted=None, amd=True, exact=True):
    """`library()` as in a fresh process, on an AMD processor or not, with a oneDNN that rounds nothing or not."""
    monkeypatch.delenv(products.SETTING, raising=False)
    if wanted is not None:
        monkeypatch.setenv(products.SETTING, wanted)
    monkeypatch.setattr(products, "_is_mkl_on_wide_amd", lambda: amd)
    monkeypatch.setattr(products, "_is_exact", lambda: exact)
    return products.library.__wrapped__()


def test_the_library_follows_the_processor_unless_it_is_pinned(monkeypatch):
    assert chosen(monkeypatch) == "onednn"
    assert chosen(monkeypatch, "auto", amd=False) == "blas"
    assert chosen(monkeypatch, "auto", exact=False) == "blas"
    assert chosen(monkeypatch, "blas") == "blas"
    assert chosen(monkeypatch, "onednn", amd=False) == "onednn"
    with pytest.raises(ConfigError, match="rounds fp32 products"):
        chosen(monkeypatch, "onednn", exact=False)
    with pytest.raises(ConfigError, match="DIT_ACCEL_CPU_PRODUCTS: expected 'auto', 'onednn' or 'blas', got 'mkl'"):
        chosen(monkeypatch, "mkl")


def test_a_library_that_rounds_is_found_out(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this build of PyTorch has no oneDNN")
    monkeypatch.setattr(torch, "bmm", lambda a, b: (a.bfloat16() @ b.bfloat16()).float())
    assert not products._is_exact()


def test_the_permission_ends_with_the_last_thread_inside(monkeypatch):
    use_library(monkeypatch, "onednn")
    switch, cpu = torch.backends.mkldnn.matmul, torch.device("cpu")
    before = switch.fp32_precision
    with products.wide_products(cpu):
        assert switch.fp32_precision == "bf16"
        with products.wide_products(cpu):
            pass
        assert switch.fp32_precision == "bf16"
    assert switch.fp32_precision == before

    @products.wide_products(cpu)
    def fails():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert switch.fp32_precision == before
    inside, leave = threading.Event(), threading.Event()

    def other():
        with products.wide_products(cpu):
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with products.wide_products(cpu):
        thread.start()
        assert inside.wait(10)
    assert switch.fp32_precision == "bf16"
    leave.set()
    thread.join()
    assert switch.fp32_precision == before


def test_other_devices_and_a_library_switched_off_are_left_alone(monkeypatch):
    use_library(monkeypatch, "onednn")
    assert products.are_wide(torch.device("cpu")) == torch.backends.mkldnn.enabled
    assert not products.are_wide(torch.device("cuda"))
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not products.are_wide(torch.device("cpu"))
