"""`block_attention`: the fast backend against the float64 specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from dit_accel.errors import PlanError, UnsupportedError
from dit_accel.kernels import Remainder, backends, block_attention
from dit_accel.kernels.merge import merge
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


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 129])
def test_lengths_around_the_block_size(tokens):
    q, k, v = tensors(queries=tokens)
    blocks = Blocking.uniform(tokens, 16)
    agree(q, k, v, random_plan(blocks, blocks))


@pytest.mark.parametrize("dim", [8, 40, 64, 72, 128])
def test_head_sizes(dim):
    q, k, v = tensors(queries=70, dim=dim)
    blocks = Blocking.uniform(70, 32)
    agree(q, k, v, random_plan(blocks, blocks))


@pytest.mark.parametrize("axes", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_plans_shared_and_not(axes):
    q, k, v = tensors(batch=2, heads=3, queries=50)
    blocks = Blocking.uniform(50, 8)
    agree(q, k, v, random_plan(blocks, blocks, axes=axes))


def test_queries_and_keys_of_different_length_and_block_size():
    q, k, v = tensors(queries=37, keys=90)
    agree(q, k, v, random_plan(Blocking.uniform(37, 8), Blocking.uniform(90, 16)))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.lists(st.integers(1, 9), min_size=1, max_size=8))
def test_ragged_blocks_anywhere(q_lengths, k_lengths):
    q_blocks, k_blocks = Blocking.from_lengths(q_lengths), Blocking.from_lengths(k_lengths)
    q, k, v = tensors(queries=q_blocks.tokens, keys=k_blocks.tokens)
    agree(q, k, v, random_plan(q_blocks, k_blocks))


@pytest.mark.parametrize("factor", [1.0, 20.0])
def test_large_logits(factor):
    q, k, v = tensors(queries=96, factor=factor)
    blocks = Blocking.uniform(96, 16)
    agree(q, k, v, random_plan(blocks, blocks))


def test_the_full_plan_is_dense_attention():
    q, k, v = tensors(queries=100)
    blocks = Blocking.uniform(100, 16)
    out = agree(q, k, v, BlockPlan.full(blocks, blocks))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("valid", [(100, 100), (61, 90), (1, 64)])
def test_padded_keys_have_zero_weight_whatever_they_hold(valid):
    q, k, v = tensors(batch=2, queries=100)
    for row, length in enumerate(valid):
        k[row, :, length:] = torch.nan
        v[row, :, length:] = torch.nan
    blocks = Blocking.uniform(100, 16)
    plan = random_plan(blocks, blocks)
    out = agree(q, k, v, plan, kv_len=torch.tensor(valid))
    assert out.isfinite().all()


def test_a_row_without_keys_gives_zero_and_minus_infinity():
    q, k, v = tensors(queries=32)
    blocks = Blocking.uniform(32, 16)
    plan = BlockPlan.from_mask(torch.tensor([[True, False], [False, True]]), blocks, blocks)
    out, lse = block_attention(
        q.float(), k.float(), v.float(), plan, kv_len=torch.tensor([16]), return_lse=True, backend="torch"
    )
    assert (out[:, :, 16:] == 0).all()
    assert lse[:, :, 16:].isneginf().all()
    assert lse[:, :, :16].isfinite().all()


@pytest.mark.parametrize("stride", [1, 2])
def test_partial_blocks_are_decided_token_by_token(stride):
    tokens, reach = 60, 7
    at = torch.arange(tokens, dtype=torch.int32).unsqueeze(-1)
    box = BoxPredicate(at - reach * stride, at + reach * stride + 1, at, (stride,))
    blocks = Blocking.uniform(tokens, 8)
    distance = (torch.arange(blocks.count)[:, None] - torch.arange(blocks.count)).abs()
    plan = BlockPlan.from_mask(distance * 8 <= reach * stride + 8, blocks, blocks)
    plan = BlockPlan(blocks, blocks, plan.indices, plan.counts, torch.zeros_like(plan.counts), box)
    offset = at - at.T
    wanted = (offset.abs() <= reach * stride) & (offset % stride == 0)
    assert torch.equal(plan.to_token_mask()[0, 0], wanted)
    q, k, v = tensors(queries=tokens)
    out = agree(q, k, v, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=wanted))


def test_full_blocks_stand_before_partial_ones():
    blocks = Blocking.uniform(24, 8)
    at = torch.arange(24, dtype=torch.int32).unsqueeze(-1)
    box = BoxPredicate(at - 3, at + 4, at)
    rows = torch.tensor([[2, 0], [0, 1], [1, 2]], dtype=torch.int32).view(1, 1, 3, 2)
    counts = torch.full((1, 1, 3), 2, dtype=torch.int32)
    plan = BlockPlan(blocks, blocks, rows, counts, torch.ones_like(counts), box).validate()
    agree(*tensors(queries=24), plan)


def test_disjoint_plans_merge_to_their_union():
    q, k, v = tensors(queries=64)
    blocks = Blocking.uniform(64, 8)
    mask = random_plan(blocks, blocks).to_mask()
    parts = [
        block_attention(q, k, v, BlockPlan.from_mask(m, blocks, blocks), return_lse=True, backend="torch")
        for m in (mask, ~mask)
    ]
    out, _ = merge([p[0] for p in parts], [p[1] for p in parts])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_the_order_of_entries_in_a_row_does_not_matter():
    q, k, v = tensors(queries=64)
    blocks = Blocking.uniform(64, 8)
    plan = BlockPlan.full(blocks, blocks)
    turned = BlockPlan(blocks, blocks, plan.indices.flip(-1).contiguous(), plan.counts)
    torch.testing.assert_close(
        block_attention(q, k, v, plan, backend="torch"), block_attention(q, k, v, turned, backend="torch")
    )


@pytest.mark.parametrize("mass", ["mean", "diagonal"])
@pytest.mark.parametrize("tokens", [64, 61])
@pytest.mark.parametrize("kv_len", [None, (50, 33)])
def test_remainders(mass, tokens, kv_len):
    q, k, v = tensors(batch=2, queries=tokens)
    blocks = Blocking.uniform(tokens, 8)
    options = {} if kv_len is None else {"kv_len": torch.tensor(kv_len)}
    agree(q, k, v, random_plan(blocks, blocks), remainder=Remainder(mass), **options)


@pytest.mark.parametrize("mass", ["mean", "diagonal"])
def test_a_remainder_of_single_tokens_is_exact(mass):
    q, k, v = tensors(queries=40)
    q_blocks, k_blocks = Blocking.uniform(40, 8), Blocking.uniform(40, 1)
    out = block_attention(q, k, v, random_plan(q_blocks, k_blocks), remainder=Remainder(mass), backend="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("mass", ["mean", "diagonal"])
def test_a_remainder_of_identical_keys_is_exact(mass):
    q, k, v = tensors(queries=64)
    k = k[:, :, ::8].repeat_interleave(8, dim=2)
    blocks = Blocking.uniform(64, 8)
    out = block_attention(q, k, v, random_plan(blocks, blocks), remainder=Remainder(mass), backend="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_nothing_remains_of_the_full_plan():
    q, k, v = tensors(queries=60)
    blocks = Blocking.uniform(60, 8)
    out = block_attention(q, k, v, BlockPlan.full(blocks, blocks), remainder=Remainder(), backend="torch")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_half_precision_inputs_are_computed_in_fp32():
    q, k, v = (x.bfloat16() for x in tensors(queries=64))
    blocks = Blocking.uniform(64, 16)
    plan = random_plan(blocks, blocks)
    out = block_attention(q, k, v, plan)
    exact = block_attention(q.float(), k.float(), v.float(), plan, backend="reference")
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, exact.bfloat16()) or (out.float() - exact).abs().max() < 2**-7


def test_strided_inputs_as_diffusers_makes_them():
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(queries=64))
    blocks = Blocking.uniform(64, 16)
    agree(q, k, v, random_plan(blocks, blocks))


def test_errors_name_shapes_and_backends():
    q, k, v = tensors(queries=32)
    blocks = Blocking.uniform(32, 16)
    plan = BlockPlan.full(blocks, blocks)
    with pytest.raises(PlanError, match="plan is for 32 queries"):
        block_attention(q[:, :, :16], k, v, plan)
    with pytest.raises(PlanError, match="expected k and v"):
        block_attention(q, k[..., :8], v, plan)
    with pytest.raises(PlanError, match="kv_len"):
        block_attention(q, k, v, plan, kv_len=torch.tensor([1.0]))
    with pytest.raises(UnsupportedError, match="did you mean 'torch'"):
        block_attention(q, k, v, plan, backend="troch")
    with pytest.raises(UnsupportedError, match=r"backend 'torch' cannot run.*not a floating-point"):
        block_attention(q.int(), k.int(), v.int(), plan, backend="torch")
    assert backends()["torch"] is None
