"""The plug-in for vLLM-Omni, called as its dispatcher calls it."""

from __future__ import annotations

import logging
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.vllm_omni import sparse_attention

GRID = (3, 5, 7)


def geometry(step=0):
    return {
        "latent_shape": torch.tensor([[3, 10, 14]]),
        "patch_size": torch.tensor([[1, 2, 2]]),
        "denoise_step_idx": torch.tensor([step]),
        "total_latent_frames": 3,
        "patches_per_frame": 35,
    }


def tensors(tokens=105):
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, tokens, 2, 16, generator=generator) for _ in range(3))


def dense(q, k, v, scale=None):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), scale=scale).transpose(1, 2)


def test_the_entry_point_names_the_function():
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    module, name = settings["project"]["entry-points"]["vllm_omni.sparse_attn"]["dit_accel"].split(":")
    assert getattr(import_module(module), name) is sparse_attention


@pytest.mark.parametrize("method", ["radial", "composed"])
def test_equals_the_method_on_bare_tensors(method):
    q, k, v = tensors()
    small = {"block": 8} if method == "radial" else {"density": 0.4, "tile": [1, 2, 4]}
    out = sparse_attention(q, k, v, {"method": method, "method_parameters": small, **geometry()})
    policy = get_method(method, **small)
    flat = tuple(x.transpose(1, 2) for x in (q, k, v))
    order, plan = policy.plan(TokenLayout(GRID), *flat)
    ordered = flat if order is None else order.apply(*flat)
    expected = block_attention(*ordered, plan, remainder=policy.remainder)
    expected = expected if order is None else order.restore(expected)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert not torch.allclose(out, dense(q, k, v), atol=1e-3)


def test_full_density_with_a_scale_is_dense():
    q, k, v = tensors()
    params = {"method_parameters": {"density": 1.0}, **geometry()}
    torch.testing.assert_close(sparse_attention(q, k, v, params, softmax_scale=0.1), dense(q, k, v, 0.1))


def test_dense_steps():
    q, k, v = tensors()
    params = {"dense_steps": 3, "method_parameters": {"density": 0.1}}
    assert torch.equal(sparse_attention(q, k, v, {**params, **geometry(2)}), dense(q, k, v))
    assert not torch.allclose(sparse_attention(q, k, v, {**params, **geometry(3)}), dense(q, k, v), atol=1e-3)


@pytest.mark.parametrize("tokens", [105, 108])
def test_without_a_fitting_geometry_it_runs_dense_and_says_so(tokens, caplog):
    q, k, v = tensors(tokens)
    params = {} if tokens == 105 else geometry()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert torch.equal(sparse_attention(q, k, v, params), dense(q, k, v))
    assert len([r for r in caplog.records if "runs dense" in r.message]) == 1


def test_bad_requests_are_refused_by_name():
    q, k, v = tensors()
    with pytest.raises(ConfigError, match="is_causal"):
        sparse_attention(q, k, v, {}, is_causal=True)
    with pytest.raises(ConfigError, match="did you mean 'method'"):
        sparse_attention(q, k, v, {"metod": "radial"})
    with pytest.raises(ConfigError, match="radial"):
        sparse_attention(q, k, v, {"method": "radia", **geometry()})
