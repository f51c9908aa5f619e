"""Inputs, random plans and the comparison that every test of the kernels shares."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from dit_accel.kernels import block_attention, products
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate


def tensors(batch=1, heads=2, queries=100, keys=None, dim=16, factor=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys

    def draw(n):
        return torch.randn(batch, heads, n, dim, generator=generator, dtype=torch.float64)

    return draw(queries) * factor, draw(keys), draw(keys)


def random_plan(q_blocks, k_blocks, share=0.4, axes=(1, 2), seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*axes, q_blocks.count, k_blocks.count, generator=generator) < share
    mask[..., 0] |= ~mask.any(-1)
    return BlockPlan.from_mask(mask, q_blocks, k_blocks)


def window_plan(q_blocks, k_blocks, reach, stride=1, all_partial=False):
    """A one-dimensional dilated window; blocks wholly inside are full unless `all_partial`."""
    at = torch.arange(k_blocks.tokens, dtype=torch.int32).unsqueeze(-1)
    centre = torch.arange(q_blocks.tokens, dtype=torch.int32).unsqueeze(-1)
    box = BoxPredicate(centre - reach * stride, centre + reach * stride + 1, at, (stride,))
    tokens = box.keeps(torch.arange(q_blocks.tokens), torch.arange(k_blocks.tokens))
    return plan_of_box(box, q_blocks, k_blocks, all_partial), tokens


def plan_of_box(box, q_blocks, k_blocks, all_partial=False):
    """The blocks that a predicate touches; those wholly inside are full unless `all_partial`."""
    tokens = box.keeps(torch.arange(q_blocks.tokens), torch.arange(k_blocks.tokens))
    tokens = tokens.expand(*tokens.shape[:-2], q_blocks.tokens, k_blocks.tokens)
    inside = torch.zeros(*tokens.shape[:-2], q_blocks.count, k_blocks.count, dtype=torch.bool)
    whole = torch.zeros_like(inside)
    for i, rows in enumerate(tokens.split(q_blocks.lengths.tolist(), -2)):
        for j, part in enumerate(rows.split(k_blocks.lengths.tolist(), -1)):
            inside[..., i, j] = part.flatten(-2).any(-1)
            whole[..., i, j] = part.flatten(-2).all(-1) & (not all_partial)
    return BlockPlan.from_mask(inside, q_blocks, k_blocks, whole, box).validate()


def ball(limit=25.0, weights=(4.0, 1.0, 1.0)):
    """A ball predicate on a grid of 4 x 5 x 6 tokens, and its token mask `[120, 120]` from the definition."""
    index = torch.arange(120)
    at = torch.stack([index // 30, index // 6 % 5, index % 6], -1).int()
    scale = torch.tensor([*weights, 4 * limit])
    box = BoxPredicate(at - 9, at + 10, at, ball=scale)
    gap = (at.unsqueeze(1) - at).double()
    return box, (gap.square() * torch.tensor(weights) * 4).sum(-1) < 4 * limit


def boxes_of_heads(tokens, reaches=((3, 9), (12, 5))):
    """A band per batch item and head, over places of its own: `[2, 2, N, 1]`; its token mask `[2, 2, N, N]`."""
    generator = torch.Generator().manual_seed(3)
    at = torch.stack([torch.stack([torch.randperm(tokens, generator=generator) for _ in row]) for row in reaches])
    reach = torch.tensor(reaches).view(2, 2, 1)
    box = BoxPredicate(*(x.int().unsqueeze(-1) for x in (at - reach, at + reach + 1, at)))
    return box, (at.unsqueeze(-1) - at.unsqueeze(-2)).abs() <= reach.unsqueeze(-1)


def agree(q, k, v, plan, **options):
    """The fast backend in fp32 may be at most twice as far from fp64 as dense fp32 attention is."""
    expected, lse = block_attention(q, k, v, plan, backend="reference", return_lse=True, **options)
    got, got_lse = block_attention(q.float(), k.float(), v.float(), plan, backend="torch", return_lse=True, **options)
    clean_k, clean_v = k.nan_to_num(), v.nan_to_num()
    exact = F.scaled_dot_product_attention(q, clean_k, clean_v)
    dense = F.scaled_dot_product_attention(q.float(), clean_k.float(), clean_v.float())
    budget = 2 * (dense - exact).abs().max().item() + 2e-6
    assert (got - expected).abs().max().item() <= budget
    finite = ~lse.isneginf()
    assert torch.equal(finite, ~got_lse.isneginf())
    torch.testing.assert_close(got_lse.double()[finite], lse[finite], atol=1e-4, rtol=1e-5)
    return expected


def both(q, k, v, plan, **options):
    """(output, log-sum-exp) of the fast backend in fp64, checked against the reference to fp64 rounding."""
    expected = block_attention(q, k, v, plan, backend="reference", return_lse=True, **options)
    got = block_attention(q, k, v, plan, backend="torch", return_lse=True, **options)
    torch.testing.assert_close(got, expected, atol=1e-11, rtol=1e-10)
    return got


def use_library(monkeypatch, name):
    """Have fp32 products made by "onednn" or "blas"; a test of oneDNN is skipped where that is missing or rounds."""
    if name == "onednn" and not products._is_exact():
        pytest.skip("no oneDNN here that multiplies fp32 matrices without rounding")
    monkeypatch.setattr(products, "library", lambda: name)


def uniform(tokens, size):
    blocks = Blocking.uniform(tokens, size)
    return blocks, blocks
