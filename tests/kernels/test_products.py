"""Products with the rows of a matrix: the same numbers by every library."""

from __future__ import annotations

import pytest
import torch

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
    for plans, is_there in ((first, True), (second, False)):
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", is_there)
        assert products.has_onednn(q) == (is_there and torch.backends.mkldnn.is_available())
        plans += [get_method(name, block=16, density=0.3).plan(layout, q, k)[1].to_mask() for name in names]
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
