"""The exact part of the Triton kernel against the float64 specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_cases import close_to_reference
from kernel_cases import ball, boxes_of_heads, plan_of_box, random_plan, tensors, uniform, window_plan
from torch.nn import functional as F

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import backends, block_attention, merge, triton_launch
from dit_accel.kernels.registry import Request
from dit_accel.kernels.triton_configs import Tile
from dit_accel.plan import Blocking, BlockPlan


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 127, 129])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_lengths_around_the_block_size(tokens, dtype):
    close_to_reference(*tensors(queries=tokens), random_plan(*uniform(tokens, 32)), dtype)


@pytest.mark.parametrize("dim", [1, 24, 40, 64, 72, 128])
def test_head_sizes(dim):
    close_to_reference(*tensors(heads=1, queries=70, dim=dim), random_plan(*uniform(70, 32), axes=(1, 1)))


@pytest.mark.parametrize("axes", [(1, 1), (1, 3), (2, 1), (2, 3)])
def test_plans_shared_and_not(axes):
    close_to_reference(*tensors(batch=2, heads=3, queries=50), random_plan(*uniform(50, 16), axes=axes))


@pytest.mark.parametrize("sizes", [(64, 16), (16, 64), (128, 64), (96, 160), (8, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_do_not_depend_on_the_blocks_of_the_plan(sizes, dtype):
    q_blocks, k_blocks = Blocking.uniform(130, sizes[0]), Blocking.uniform(170, sizes[1])
    plan = random_plan(q_blocks, k_blocks, axes=(1, 1))
    close_to_reference(*tensors(heads=1, queries=130, keys=170), plan, dtype)


@pytest.mark.parametrize("seed", range(4))
def test_ragged_blocks_anywhere(seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = [torch.randint(1, high, (5,), generator=generator) for high in (40, 90)]
    q_blocks, k_blocks = (Blocking.from_lengths(x) for x in lengths)
    plan = random_plan(q_blocks, k_blocks, seed=seed)
    close_to_reference(*tensors(queries=q_blocks.tokens, keys=k_blocks.tokens), plan)


@pytest.mark.parametrize("k_size", [16, 64])
@pytest.mark.parametrize("valid", [(100, 61), (1, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_padded_keys_have_zero_weight_whatever_they_hold(valid, dtype, k_size):
    q, k, v = tensors(batch=2, queries=100)
    for row, length in enumerate(valid):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    plan = random_plan(*uniform(100, k_size))
    _, got = close_to_reference(q, k, v, plan, dtype, kv_len=torch.tensor(valid))
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_blocks_that_are_not_selected_are_not_read(dtype):
    q, k, v = tensors(queries=128, heads=1)
    plan = BlockPlan.from_mask(torch.tensor([[True, False], [True, False]]), *uniform(128, 64))
    k[:, :, 64:] = v[:, :, 64:] = torch.inf
    out = block_attention(*(x.to(dtype) for x in (q, k, v)), plan, backend="triton")
    wanted = F.scaled_dot_product_attention(q, k[:, :, :64], v[:, :, :64])
    torch.testing.assert_close(out.double(), wanted, atol=3e-3, rtol=0)


def test_entries_beyond_the_count_are_not_read():
    plan = random_plan(*uniform(100, 16))
    broken = torch.where(plan.valid, plan.indices, 2**30)
    close_to_reference(*tensors(queries=100), replace(plan, indices=broken))


def test_lists_may_be_a_slice_of_longer_ones():
    plan = random_plan(*uniform(100, 16))
    longer = torch.cat([plan.indices, torch.full_like(plan.indices, 2**30)], -1)
    sliced = longer[..., : plan.indices.shape[-1]]
    assert not sliced.is_contiguous()
    close_to_reference(*tensors(queries=100), replace(plan, indices=sliced))


@pytest.mark.parametrize("tile", [Tile(32, 16, 4, 1), Tile(32, 32, 4, 2, tma=True)], ids=str)
def test_an_item_without_any_key_gives_zero(monkeypatch, tile):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: tile)
    q, k, v = tensors(batch=2, heads=1, queries=40)
    k[0] = v[0] = torch.nan
    plan = random_plan(*uniform(40, 32), axes=(1, 1))
    _, got = close_to_reference(q, k, v, plan, torch.float16, kv_len=torch.tensor([0, 40]))
    assert (got[0] == 0).all()


def test_a_row_without_keys_gives_zero_and_minus_infinity():
    q, k, v = (x.float() for x in tensors(queries=32))
    plan = BlockPlan.from_mask(torch.tensor([[True, False], [False, True]]), *uniform(32, 16))
    out, lse = block_attention(q, k, v, plan, kv_len=torch.tensor([16]), return_lse=True, backend="triton")
    assert (out[:, :, 16:] == 0).all()
    assert lse[:, :, 16:].isneginf().all()
    assert lse[:, :, :16].isfinite().all()


@pytest.mark.parametrize(("reach", "stride"), [(9, 1), (4, 2), (2, 5)])
@pytest.mark.parametrize("all_partial", [True, False])
def test_partial_blocks_are_decided_token_by_token(reach, stride, all_partial):
    plan, tokens = window_plan(*uniform(75, 16), reach, stride, all_partial)
    expected, _ = close_to_reference(*tensors(queries=75), plan)
    q, k, v = (x.float().double() for x in tensors(queries=75))
    torch.testing.assert_close(expected, F.scaled_dot_product_attention(q, k, v, attn_mask=tokens))


def test_partial_ragged_blocks_longer_than_a_tile():
    blocks = Blocking.from_lengths([70, 9, 40, 3])
    plan, _ = window_plan(blocks, blocks, 30)
    close_to_reference(*tensors(queries=122), plan, kv_len=torch.tensor([110]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_logits(dtype):
    q, k, v = tensors(queries=96)
    q = q * 320 / (q @ k.transpose(-1, -2)).abs().max()
    close_to_reference(q, k, v, random_plan(*uniform(96, 16)), dtype, slack=1e-4)


def test_the_order_of_the_list_does_not_matter():
    q, k, v = (x.float() for x in tensors(queries=128))
    plan = BlockPlan.full(*uniform(128, 16))
    shuffled = plan.indices[..., torch.randperm(8, generator=torch.Generator().manual_seed(0))].contiguous()
    out = block_attention(q, k, v, plan, backend="triton")
    again = block_attention(q, k, v, replace(plan, indices=shuffled), backend="triton")
    torch.testing.assert_close(out, again, atol=1e-6, rtol=0)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=0)


def test_disjoint_plans_merge_to_their_union():
    q, k, v = (x.float() for x in tensors(queries=64))
    mask = random_plan(*uniform(64, 16)).to_mask()
    mask[..., 0], mask[..., 3] = True, False
    parts = [BlockPlan.from_mask(x, *uniform(64, 16)) for x in (mask, ~mask)]
    outs, lses = zip(*(block_attention(q, k, v, p, return_lse=True, backend="triton") for p in parts), strict=True)
    merged, _ = merge(outs, lses)
    torch.testing.assert_close(merged, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=0)


def test_the_axis_order_of_diffusers_needs_no_copy():
    q, k, v = (x.float().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors(queries=70, heads=3))
    plan = random_plan(*uniform(70, 16), axes=(1, 3))
    out = block_attention(q, k, v, plan, backend="triton")
    assert out.stride() == q.stride()
    torch.testing.assert_close(out, block_attention(q, k, v, plan, backend="torch"), atol=2e-6, rtol=0)


@pytest.mark.parametrize("tile", [Tile(128, 64, 8, 2), Tile(16, 32, 4, 2, tma=True), Tile(32, 16, 4, 1)], ids=str)
@pytest.mark.parametrize("valid", [None, 77])
def test_every_kind_of_tile(monkeypatch, tile, valid):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: tile)
    q, k, v = tensors(queries=140, heads=1, dim=32)
    options = {}
    if valid is not None:
        k[:, :, valid:] = v[:, :, valid:] = torch.nan
        options["kv_len"] = torch.tensor([valid])
    close_to_reference(q, k, v, random_plan(*uniform(140, 64), axes=(1, 1)), torch.float16, **options)


def test_the_reason_names_what_is_missing():
    request = Request(torch.device("cpu"), torch.float32, 64)
    assert backends(request)["triton"] is None
    for changed, words in [
        ({"dtype": torch.bfloat16}, "interpreter computes bfloat16 wrongly"),
        ({"dtype": torch.float64}, "not one of float16"),
        ({"head_dim": 300}, "above 256"),
        ({"device": torch.device("meta")}, "the tensors are on meta"),
    ]:
        assert words in backends(replace(request, **changed))["triton"]
    q, k, v = tensors(queries=40)
    with pytest.raises(UnsupportedError, match="backend 'triton' cannot run this call: dtype"):
        block_attention(q, k, v, random_plan(*uniform(40, 16)), backend="triton")


def test_balls_and_boxes_of_heads():
    box, _ = ball()
    close_to_reference(*tensors(batch=2, queries=120), plan_of_box(box, *uniform(120, 16)))
    box, _ = boxes_of_heads(61)
    q, k, v = tensors(batch=2, queries=61)
    close_to_reference(q, k, v, plan_of_box(box, *uniform(61, 16)), kv_len=torch.tensor([61, 50]))
