"""`block_attention`: the fast backend against the float64 specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    agree,
    ball,
    both,
    boxes_of_heads,
    plan_of_box,
    random_plan,
    tensors,
    uniform,
    use_library,
    window_plan,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.errors import ConfigError, PlanError, UnsupportedError
from dit_accel.kernels import Remainder, backends, block_attention, chunk, merge, remainder, torch_backend
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 127, 129])
def test_lengths_around_the_block_size(tokens):
    q, k, v = tensors(queries=tokens)
    blocks = Blocking.uniform(tokens, 16)
    agree(q, k, v, random_plan(blocks, blocks))


@pytest.mark.parametrize("dim", [1, 16, 40, 64, 72, 128])
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
    with pytest.raises(ConfigError, match="did you mean 'torch'"):
        block_attention(q, k, v, plan, backend="troch")
    with pytest.raises(UnsupportedError, match=r"backend 'torch' cannot run.*not a floating-point"):
        block_attention(q.int(), k.int(), v.int(), plan, backend="torch")
    assert backends()["torch"] is None


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_of_eighty(sign):
    q, k, v = tensors(queries=96)
    logits = q @ k.transpose(-1, -2)
    q = q * sign * 80 * 16**0.5 / logits.abs().max()
    agree(q, k, v, random_plan(*uniform(96, 16)))


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 14])
@pytest.mark.parametrize("share", [0.2, 0.8])
def test_chunks_of_any_size_give_the_same(monkeypatch, chunk_bytes, share):
    q, k, v = tensors(batch=2, queries=130)
    plan = random_plan(*uniform(130, 16), share=share, axes=(2, 2))
    whole = both(q, k, v, plan)
    monkeypatch.setattr(torch_backend, "_CHUNK_BYTES", chunk_bytes)
    torch.testing.assert_close(both(q, k, v, plan), whole)


@pytest.mark.parametrize("library", ["onednn", "blas"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("logits", [1, 1 << 22])
def test_both_libraries_agree_with_the_specification(monkeypatch, library, dtype, logits):
    use_library(monkeypatch, library)
    monkeypatch.setattr(chunk, "_LOGITS", logits)
    q, k, v = (x.to(dtype) for x in tensors(batch=2, queries=131, dim=72, factor=4.0))
    blocks, valid = Blocking.from_lengths([31, 33, 32, 1, 34]), torch.tensor([131, 90])
    window, _ = window_plan(blocks, blocks, reach=40)
    for plan in (random_plan(blocks, blocks, axes=(2, 2)), window):
        exact = block_attention(*(x.double() for x in (q, k, v)), plan, backend="reference", kv_len=valid)
        got = block_attention(q, k, v, plan, backend="torch", kv_len=valid)
        dense, wide = (
            F.scaled_dot_product_attention(*(x.to(kind) for x in (q, k, v))) for kind in (dtype, torch.float64)
        )
        assert (got - exact).abs().max() <= 2 * (dense - wide).abs().max() + 1e-12


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("all_partial", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(60, 60), (60, 45)])
def test_windows_of_full_and_partial_blocks(stride, all_partial, queries, keys):
    q, k, v = tensors(batch=2, queries=queries, keys=keys)
    q_blocks, k_blocks = Blocking.from_lengths([7, 8, 8, 3, 8, 8, 8, queries - 50]), Blocking.uniform(keys, 4)
    plan, tokens = window_plan(q_blocks, k_blocks, reach=10, stride=stride, all_partial=all_partial)
    assert torch.equal(plan.to_token_mask()[0, 0], tokens)
    assert all_partial or stride > 1 or int(plan.full_counts.max()) > 0
    both(q, k, v, plan)
    agree(q, k, v, plan, kv_len=torch.tensor([keys, keys - 9]))


@pytest.mark.parametrize("limit", [1.0, 9.0, 25.0])
def test_balls_are_cut_token_by_token(limit):
    q, k, v = tensors(batch=2, queries=120)
    box, tokens = ball(limit)
    plan = plan_of_box(box, *uniform(120, 8))
    assert torch.equal(plan.to_token_mask()[0, 0], tokens)
    both(q, k, v, plan)
    agree(q, k, v, plan, kv_len=torch.tensor([120, 113]))


@pytest.mark.parametrize("tokens", [64, 61])
def test_each_head_may_have_boxes_of_its_own(tokens):
    q, k, v = tensors(batch=2, queries=tokens)
    box, expected = boxes_of_heads(tokens)
    plan = plan_of_box(box, *uniform(tokens, 16))
    assert torch.equal(plan.to_token_mask(), expected)
    both(q, k, v, plan)
    agree(q, k, v, plan, kv_len=torch.tensor([tokens, tokens - 9]))
    for item in range(2):
        for head in range(2):
            own = box.of_head(item, head).keeps(torch.arange(tokens), torch.arange(tokens))
            assert torch.equal(own, expected[item, head])


@pytest.mark.parametrize("valid", [32, 33, 47, 100])
def test_whole_and_cut_blocks_behind_the_valid_keys(valid):
    q, k, v = tensors(queries=100)
    k[:, :, valid:], v[:, :, valid:] = torch.nan, torch.inf
    plan = random_plan(*uniform(100, 16), share=0.6)
    out, _ = both(q, k, v, plan, kv_len=torch.tensor([valid]))
    mask = plan.to_token_mask()[..., :valid]
    expected = F.scaled_dot_product_attention(q, k[:, :, :valid], v[:, :, :valid], attn_mask=mask)
    rows = mask.any(-1)
    torch.testing.assert_close(out[rows.expand(out.shape[:3])], expected[rows.expand(out.shape[:3])])


def test_memory_nobody_wrote_is_never_read():
    q, k, v = tensors(batch=2, queries=75)
    blocks = Blocking.from_lengths([9, 16, 16, 2, 16, 16])
    options = {"kv_len": torch.tensor([75, 40]), "remainder": Remainder("diagonal", "grouped", 2)}
    torch.use_deterministic_algorithms(True)  # fills every new buffer with NaN
    try:
        out, _ = both(q, k, v, random_plan(blocks, blocks), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    assert out.isfinite().all()


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation made."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("first_order", ["none", "block", "grouped", "global"])
def test_nothing_of_the_size_of_the_scores_is_ever_made(monkeypatch, first_order):
    monkeypatch.setattr(torch_backend, "_CHUNK_BYTES", 1 << 16)
    monkeypatch.setattr(remainder, "_CHUNK_NUMBERS", 1 << 14)
    tokens = 1500
    q, k, v = (x.float() for x in tensors(heads=1, queries=tokens))
    plan = random_plan(*uniform(tokens, 32), share=0.1, axes=(1, 1))
    with LargestTensor() as seen:
        block_attention(q, k, v, plan, remainder=Remainder(first_order=first_order, group=4), backend="torch")
    assert tokens * 16 <= seen.largest <= tokens * tokens // 32


def test_merge_weighs_parts_without_keys_with_nothing():
    q, k, v = tensors(queries=20)
    out = F.scaled_dot_product_attention(q, k, v)
    lse = (q @ k.transpose(-1, -2) / 4).logsumexp(-1)
    nothing = torch.full_like(lse, -torch.inf)
    merged = merge([torch.zeros_like(out), out], [nothing, lse])
    torch.testing.assert_close(merged, (out, lse))
    empty, empty_lse = merge([torch.zeros_like(out)] * 2, [nothing] * 2)
    assert (empty == 0).all()
    assert empty_lse.isneginf().all()
    with pytest.raises(PlanError, match="merge: expected a log-sum-exp"):
        merge([out], [lse[..., :3]])


def test_a_whole_block_is_whole_even_where_the_predicate_would_drop_it():
    """As for a sink: the ragged last block is attended by every query although it lies outside the window."""
    blocks = Blocking.uniform(30, 8)
    window, tokens = window_plan(blocks, blocks, reach=3, all_partial=True)
    whole = torch.zeros(4, 4, dtype=torch.bool)
    whole[:, 3] = True
    plan = BlockPlan.from_mask(window.to_mask()[0, 0] | whole, blocks, blocks, whole, window.predicate)
    tokens[:, 24:] = True
    q, k, v = tensors(queries=30)
    out, _ = both(q, k, v, plan)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=tokens))
