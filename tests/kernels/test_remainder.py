"""The remainder: the properties that piecewise sparse attention (arXiv 2602.01077) and its successors must have."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import agree, both, random_plan, tensors, uniform
from torch.nn import functional as F

from dit_accel.errors import PlanError
from dit_accel.kernels import Remainder, block_attention, remainder
from dit_accel.plan import Blocking, BlockPlan

ORDERS = ["none", "block", "mixed", "grouped", "global"]
ABOUT_KEY = [Remainder(mass, order, 3) for mass in ("mean", "diagonal") for order in ORDERS]
ABOUT_QUERY = [Remainder("mean", order, 3, "query") for order in ORDERS]
EVERY = pytest.mark.parametrize("rest", ABOUT_KEY + ABOUT_QUERY, ids=str)


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


@EVERY
@pytest.mark.parametrize("tokens", [64, 61])
@pytest.mark.parametrize("kv_len", [None, (50, 33)])
def test_the_fast_path_follows_the_definition(rest, tokens, kv_len):
    q, k, v = tensors(batch=2, queries=tokens)
    options = {} if kv_len is None else {"kv_len": torch.tensor(kv_len)}
    for row, length in enumerate(kv_len or ()):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    plan = random_plan(*uniform(tokens, 8))
    both(q, k, v, plan, remainder=rest, **options)
    if rest.first_order == "none":
        agree(q, k, v, plan, remainder=rest, **options)


@EVERY
def test_ragged_blocks_and_other_lengths_of_keys(rest):
    q_blocks, k_blocks = Blocking.from_lengths([3, 9, 1, 7]), Blocking.from_lengths([5, 1, 12, 4, 12, 2, 7])
    q, k, v = tensors(queries=q_blocks.tokens, keys=k_blocks.tokens, dim=10)
    both(q, k, v, random_plan(q_blocks, k_blocks), remainder=rest)


@EVERY
def test_nothing_remains_of_the_full_plan(rest):
    q, k, v = tensors(queries=60)
    plan = BlockPlan.full(*uniform(60, 8))
    out = block_attention(q, k, v, plan, remainder=rest, backend="torch")
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-12, rtol=0)


@pytest.mark.parametrize("mass", ["mean", "diagonal"])
def test_single_tokens_are_exact(mass):
    q, k, v = tensors(queries=40)
    plan = random_plan(Blocking.uniform(40, 8), Blocking.uniform(40, 1))
    for order in ORDERS:
        out = block_attention(q, k, v, plan, remainder=Remainder(mass, order), backend="torch")
        torch.testing.assert_close(out, dense(q, k, v))


@EVERY
def test_identical_keys_in_each_block_are_exact(rest):
    q, k, v = tensors(queries=64)
    k = k[:, :, ::8].repeat_interleave(8, dim=2)
    out = block_attention(q, k, v, random_plan(*uniform(64, 8)), remainder=rest, backend="torch")
    torch.testing.assert_close(out, dense(q, k, v))


@pytest.mark.parametrize("order", ORDERS[1:])
def test_values_constant_in_each_block_leave_no_first_order(order):
    q, k, v = tensors(queries=64)
    v = v[:, :, ::8].repeat_interleave(8, dim=2)
    plan = random_plan(*uniform(64, 8))
    zeroth = block_attention(q, k, v, plan, remainder=Remainder(), backend="torch")
    out = block_attention(q, k, v, plan, remainder=Remainder(first_order=order), backend="torch")
    torch.testing.assert_close(out, zeroth)


@EVERY
def test_constant_values_come_out_unchanged(rest):
    q, k, v = tensors(queries=61)
    v = torch.full_like(v, 3.0)
    out = block_attention(q, k, v, random_plan(*uniform(61, 8)), remainder=rest, backend="torch")
    torch.testing.assert_close(out, v)


def spread_error(rest, spread):
    """Relative error against dense attention with a key spread of `spread` inside the blocks."""
    q, k, v = tensors(heads=4, queries=128, dim=8)
    k = (
        k[:, :, ::8].repeat_interleave(8, dim=2)
        + spread * torch.randn(k.shape, generator=torch.Generator().manual_seed(5)).double()
    )
    out = block_attention(
        q, k, v, random_plan(*uniform(128, 8), share=0.2, axes=(1, 4)), remainder=rest, backend="torch"
    )
    exact = dense(q, k, v)
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize(("order", "slope"), [("none", 2), ("block", 4)])
def test_the_error_shrinks_with_the_order_of_the_expansion(order, slope):
    coarse, fine = (spread_error(Remainder(first_order=order), spread) for spread in (0.04, 0.02))
    assert coarse / fine == pytest.approx(slope, rel=0.1)


@pytest.mark.parametrize("rest", ABOUT_QUERY, ids=str)
def test_about_the_query_identical_queries_in_each_block_are_exact(rest):
    q, k, v = tensors(queries=64, factor=3.0)
    q = q[:, :, ::8].repeat_interleave(8, dim=2)
    out = block_attention(q, k, v, random_plan(*uniform(64, 8)), remainder=rest, backend="torch")
    torch.testing.assert_close(out, dense(q, k, v))


@pytest.mark.parametrize(("order", "slope"), [("none", 4), ("mixed", 8), ("block", 8)])
def test_about_the_query_the_error_is_of_second_or_third_order_in_both_spreads(order, slope):
    def error(spread):
        q, k, v = tensors(heads=4, queries=128, dim=8)
        q, k = (x[:, :, ::8].repeat_interleave(8, dim=2) + spread * x for x in (q, k))
        rest = Remainder("mean", order, about="query")
        plan = random_plan(*uniform(128, 8), share=0.2, axes=(1, 4))
        out = block_attention(q, k, v, plan, remainder=rest, backend="torch")
        return float((out - dense(q, k, v)).norm())

    assert error(0.02) / error(0.01) == pytest.approx(slope, rel=0.1)


def test_about_the_query_is_closer_than_about_the_key_where_queries_are_alike():
    q, k, v = tensors(heads=4, queries=128, dim=8, factor=2.0)
    q = q[:, :, ::8].repeat_interleave(8, dim=2) + 0.2 * q
    plan = random_plan(*uniform(128, 8), share=0.2, axes=(1, 4))
    exact = dense(q, k, v)
    about_key, about_query = (
        (block_attention(q, k, v, plan, remainder=rest, backend="torch") - exact).norm()
        for rest in (Remainder("diagonal", "block"), Remainder(about="query"))
    )
    assert about_query < 0.5 * about_key


def test_the_mass_about_the_query_is_not_corrected():
    with pytest.raises(PlanError, match=r"Remainder\.mass: expected 'mean' with about='query'"):
        Remainder("diagonal", about="query")


def test_every_term_beats_dropping_the_rest():
    dropped, zeroth = spread_error(None, 0.4), spread_error(Remainder(), 0.4)
    assert zeroth < 0.5 * dropped
    assert spread_error(Remainder(first_order="block"), 0.4) < zeroth
    assert spread_error(Remainder("diagonal", "block"), 0.4) < spread_error(Remainder(first_order="block"), 0.4)


@EVERY
def test_chunks_of_any_size_give_the_same_when_the_maximum_lies_in_the_rest(monkeypatch, rest):
    """Only the weakest block is exact, so every accumulator must follow the maximum of the summaries."""
    q, k, v = tensors(heads=1, queries=64, factor=8.0)
    weakest = (q.mean(2, keepdim=True) @ k.transpose(-1, -2)).view(8, 8).sum(-1).argmin()
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[:, weakest] = True
    plan = BlockPlan.from_mask(mask, *uniform(64, 8))
    whole = both(q, k, v, plan, remainder=rest)
    for numbers in (1, 700):
        monkeypatch.setattr(remainder, "_CHUNK_NUMBERS", numbers)
        torch.testing.assert_close(both(q, k, v, plan, remainder=rest), whole)


@EVERY
def test_the_order_of_tokens_inside_a_block_does_not_matter(rest):
    q, k, v = tensors(queries=64)
    inside = torch.cat([8 * j + torch.randperm(8, generator=torch.Generator().manual_seed(j)) for j in range(8)])
    plan = random_plan(*uniform(64, 8))
    once, again = (
        block_attention(q, x, y, plan, remainder=rest, backend="torch")
        for x, y in ((k, v), (k[:, :, inside], v[:, :, inside]))
    )
    torch.testing.assert_close(once, again)


@EVERY
def test_a_vector_added_to_all_keys_changes_nothing_but_the_log_sum_exp(rest):
    q, k, v = tensors(queries=64)
    shift = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1)).double()
    plan = random_plan(*uniform(64, 8))
    out, lse = both(q, k, v, plan, remainder=rest)
    shifted, shifted_lse = both(q, k + shift, v, plan, remainder=rest)
    torch.testing.assert_close(shifted, out)
    torch.testing.assert_close(shifted_lse, lse + (q * shift).sum(-1) / 4)


def test_the_second_order_mass_is_capped():
    q, k, v = tensors(queries=64, factor=200.0)
    out, lse = both(q, k, v, random_plan(*uniform(64, 8)), remainder=Remainder("diagonal", "global"))
    assert out.isfinite().all()
    assert lse.isfinite().all()


@EVERY
def test_large_logits_in_single_precision(rest):
    q, k, v = tensors(queries=96)
    q = q * 80 * 4 / (q @ k.transpose(-1, -2)).abs().max()
    plan = random_plan(*uniform(96, 8))
    expected = block_attention(q, k, v, plan, remainder=rest, backend="reference")
    got = block_attention(q.float(), k.float(), v.float(), plan, remainder=rest, backend="torch")
    assert (got - expected).abs().max() < 2e-4 * expected.abs().max()


def test_an_item_without_any_key_gives_zero():
    q, k, v = tensors(batch=2, queries=32)
    plan = random_plan(*uniform(32, 8))
    out, lse = both(q, k, v, plan, remainder=Remainder("diagonal", "block"), kv_len=torch.tensor([0, 32]))
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()


def test_a_group_holds_at_least_one_block():
    with pytest.raises(PlanError, match=r"Remainder\.group: expected at least 1, got 0"):
        Remainder(group=0)
