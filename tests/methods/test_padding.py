"""What stands in the slots of a short block, for scores: nothing, its last token, or zeros."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.methods.dynamic import PoolingMethod
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.plan import Blocking
from dit_accel.selection import block_means, gather_blocks
from dit_accel.state import CallContext

METHODS = [name for name in list_methods() if issubclass(method_class(name), PoolingMethod)]
RAGGED, WHOLE = TokenLayout((1, 1, 53)), TokenLayout((1, 1, 64))


def filled(x, padding):
    """53 tokens as the 64 that released code makes of them."""
    more = x[:, :, -1:].expand(-1, -1, 11, -1) if padding == "repeat" else torch.zeros_like(x[:, :, :11])
    return torch.cat([x, more], 2)


def method(name, **parameters):
    fixed = {"sparge": {"smooth": False, "similarity": 0.1}, "asa": {"samples": 5}, "psa": {"samples": 0.3}}
    extra = {"key_block": 16} if "key_block" in method_class(name).model_fields else {}
    return get_method(name, block=16, order="raster", density=0.5, **extra, **fixed.get(name, {}), **parameters)


def test_the_methods_that_pool_or_sample():
    assert METHODS == ["asa", "psa", "sparge", "subblock", "xattention"]


@pytest.mark.parametrize("padding", ["repeat", "zero"])
@pytest.mark.parametrize("name", METHODS)
def test_scores_are_those_of_the_tokens_filled_up(name, padding):
    q, k, _ = cases.tensors(RAGGED)
    rule, plain = method(name, padding=padding), method(name)
    blocks, whole = rule.blocks(RAGGED), plain.blocks(WHOLE)
    found = rule.scores(q, k, CallContext(RAGGED), *blocks)
    expected = plain.scores(filled(q, padding), filled(k, padding), CallContext(WHOLE), *whole)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, plain.scores(q, k, CallContext(RAGGED), *blocks), atol=1e-3)
    if name == "sparge":
        gates = rule.beside(q, k, CallContext(RAGGED), *blocks)
        assert torch.equal(gates, plain.beside(filled(q, padding), filled(k, padding), CallContext(WHOLE), *whole))


@pytest.mark.parametrize("padding", ["real", "repeat", "zero"])
@pytest.mark.parametrize("name", METHODS)
def test_attention_itself_never_sees_what_fills_up(name, padding):
    layout = TokenLayout((2, 3, 7), 9, "after", (47, 51))
    q, k, v = cases.tensors(layout)
    rule = method(name, padding=padding)
    out = cases.attend(rule, layout, q, k, v)
    for x, poison in zip((q, k, v), (-50.0, 50.0, torch.nan), strict=True):
        x[0, :, 47:] = poison
    torch.testing.assert_close(cases.attend(rule, layout, q, k, v)[0, :, :47], out[0, :, :47])
    dense = rule.model_copy(update={"density": 1.0, "similarity": -1.0} if name == "sparge" else {"density": 1.0})
    q, k, v = (x.nan_to_num() for x in (q, k, v))
    whole = cases.attend(dense, layout, q, k, v)
    torch.testing.assert_close(whole[1, :, :51], cases.dense(layout, q, k, v)[1, :, :51], atol=2e-6, rtol=1e-5)


def test_slots_of_a_short_block():
    x = torch.arange(1.0, 8.0).view(1, 1, 7, 1).repeat(2, 1, 1, 1)
    x[1, :, 4:] = torch.nan
    blocks = Blocking.from_lengths([3, 2, 2], 4)
    expected = {
        "real": ([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 0, 0]], [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]]),
        "repeat": ([[1, 2, 3, 3], [4, 5, 5, 5], [6, 7, 7, 7]], [[1, 2, 3, 3], [4, 4, 4, 4], [0, 0, 0, 0]]),
        "zero": ([[1, 2, 3, 0], [4, 5, 0, 0], [6, 7, 0, 0]], [[1, 2, 3, 0], [4, 0, 0, 0], [0, 0, 0, 0]]),
    }
    counts = {"real": [[3, 2, 2], [3, 1, 0]], "repeat": [[4, 4, 4], [4, 4, 0]], "zero": [[4, 4, 4], [4, 4, 0]]}
    for padding, rows in expected.items():
        found, real = gather_blocks(x, blocks, (7, 4), padding)
        assert found[:, 0, ..., 0].tolist() == list(rows)
        assert real.sum(-1).tolist() == counts[padding]
        means, number = block_means(x, blocks, (7, 4), padding)
        assert number[:, 0].tolist() == counts[padding]
        total = torch.tensor(rows).sum(-1) / torch.tensor(counts[padding]).clamp(min=1)
        torch.testing.assert_close(means[:, 0, :, 0], total)
