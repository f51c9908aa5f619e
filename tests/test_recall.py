"""Recall of a plan against the share of the softmax it covers, token by token."""

from __future__ import annotations

import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.recall import sampled_rows


def covered(plan, q, k, valid):
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).double()
    keys = torch.arange(k.shape[2]) < torch.tensor(valid)[:, None]
    weights = weights.masked_fill(~keys[:, None, None], -torch.inf).softmax(-1)
    share = (weights * plan.to_token_mask()).sum(-1)
    return torch.stack([share[item, :, :length].mean(-1) for item, length in enumerate(valid)])


def tensors(tokens, seed=0):
    return torch.randn(2, 2, 3, tokens, 8, generator=torch.Generator().manual_seed(seed)).unbind(0)


def test_recall_of_all_rows_is_the_covered_share():
    q, k = tensors(70)
    mask = torch.rand(2, 3, 5, 8, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, Blocking.uniform(70, 16), Blocking.uniform(70, 9))
    torch.testing.assert_close(plan.recall(q, k), covered(plan, q, k, (70, 70)), atol=1e-6, rtol=1e-5)
    q[1, :, 61:], k[1, :, 61:] = torch.nan, torch.nan
    lengths = torch.tensor([70, 61])
    clean = [x.nan_to_num() for x in (q, k)]
    torch.testing.assert_close(plan.recall(q, k, kv_len=lengths), covered(plan, *clean, (70, 61)), atol=1e-6, rtol=1e-5)


def test_recall_sees_the_predicate_of_partial_blocks():
    layout = TokenLayout((4, 6, 6))
    q, k = tensors(layout.tokens)
    order, plan = get_method("neighborhood").plan(layout, q, k)
    q, k, _ = (q, k, k) if order is None else order.apply(q, k, k)
    torch.testing.assert_close(plan.recall(q, k), covered(plan, q, k, (144, 144)), atol=1e-6, rtol=1e-5)


def test_sampled_recall_is_near_and_chunks_do_not_change_it(monkeypatch):
    q, k = tensors(700)
    plan = BlockPlan.from_mask(torch.eye(11, dtype=torch.bool), Blocking.uniform(700, 64), Blocking.uniform(700, 64))
    every, some = plan.recall(q, k, rows=700), plan.recall(q, k, rows=200)
    assert (every - some).abs().max() < 0.02
    monkeypatch.setattr("dit_accel.recall._ELEMENTS", 1)
    torch.testing.assert_close(plan.recall(q, k, rows=200), some)
    assert plan.recall(q.double(), k.double(), rows=200).sub(some).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [5, 64, 1000])
def test_sampled_rows_are_spread_and_seeded(tokens):
    rows = sampled_rows(tokens, 64, seed=3)
    assert len(rows) == min(64, tokens)
    assert (rows.diff() > 0).all()
    assert torch.equal(rows, sampled_rows(tokens, 64, seed=3))
    if tokens == 1000:
        assert torch.equal(rows * 64 // 1000, torch.arange(64)) or rows.diff().max() < 32
