"""INT8 queries and keys: the emulation against its definition, and what smoothing must and must not change."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import both, random_plan, tensors, uniform, window_plan
from torch.nn import functional as F

from dit_accel.errors import PlanError
from dit_accel.kernels import Precision, Remainder, block_attention
from dit_accel.kernels.quantize import round_to_int8
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import smooth_keys

INT8 = Precision("int8")


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rest", [None, Remainder("diagonal", "block")])
@pytest.mark.parametrize("kv_len", [None, (75, 40)])
def test_the_fast_path_follows_the_definition(smooth, rest, kv_len):
    q, k, v = tensors(batch=2, queries=75)
    blocks = Blocking.from_lengths([9, 16, 16, 2, 16, 16])
    options = {} if kv_len is None else {"kv_len": torch.tensor(kv_len)}
    for row, length in enumerate(kv_len or ()):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    plan = random_plan(blocks, blocks)
    rounded, _ = both(q, k, v, plan, precision=Precision("int8", smooth), remainder=rest, **options)
    exact, _ = both(q, k, v, plan, remainder=rest, **options)
    assert 1e-5 < (rounded - exact).abs().max() < 0.05


@pytest.mark.parametrize("precision", [Precision(skip=1.5), Precision("int8", skip=0.0)], ids=str)
@pytest.mark.parametrize("windows", [False, True])
def test_tiles_far_below_the_maximum_are_left_out(precision, windows):
    q, k, v = tensors(batch=2, queries=75, factor=3.0)
    k[:, :, 32:] *= 0.05
    k[1, :, 40:] = v[1, :, 40:] = torch.nan
    blocks = Blocking.uniform(75, 16)
    plan = window_plan(blocks, blocks, 30)[0] if windows else random_plan(blocks, blocks, share=0.8)
    options = {"precision": precision, "kv_len": torch.tensor([75, 40]), "remainder": Remainder()}
    skipped, _ = both(q, k, v, plan, **options)
    kept = block_attention(q, k, v, plan, backend="reference", **options | {"precision": Precision(precision.qk)})
    assert (skipped - kept).abs().max() > 1e-6


def test_what_is_skipped_weighs_little_and_a_large_limit_skips_nothing():
    q, k, v = tensors(queries=96, factor=4.0)
    k[:, :, 48:] *= 0.05
    plan = BlockPlan.full(*uniform(96, 8))
    exact, lse = both(q, k, v, plan)
    for limit in (1.0, 3.0):
        # Every tile left out weighs at most 8 exp(-limit) of the largest weight of the row.
        out, other = both(q, k, v, plan, precision=Precision(skip=limit))
        bound = 12 * 8 * torch.e**-limit
        assert 0 < (lse - other).max() <= bound
        assert (out - exact).abs().max() <= 2 * bound * v.abs().max()
    torch.testing.assert_close(both(q, k, v, plan, precision=Precision(skip=1e3))[0], exact, atol=0, rtol=0)
    with pytest.raises(PlanError, match=r"Precision.skip: expected at least 0, got -1"):
        Precision(skip=-1)


@pytest.mark.parametrize("tokens", [1, 17])
def test_rounding_is_within_half_a_step_and_away_from_zero(tokens):
    x = torch.randn(3, tokens, 16, generator=torch.Generator().manual_seed(0)).double()
    step = x.abs().amax((1, 2), keepdim=True) / 127 + 1e-7
    levels = round_to_int8(x) / step
    assert ((round_to_int8(x) - x).abs() <= step / 2 + 1e-12).all()
    torch.testing.assert_close(levels, levels.round())
    assert levels.abs().max() <= 127
    # The largest value 127 + 1.27e-5 makes the step exactly one, up to rounding, and 2.5 a tie.
    ties = torch.tensor([[[127 - 1.27e-5, 2.6, -2.6, 2.4, -2.4, 0.0]]], dtype=torch.float64)
    assert (round_to_int8(ties) / (ties.abs().max() / 127 + 1e-7)).round().tolist() == [[[127, 3, -3, 2, -2, 0]]]


def test_blocks_of_one_value_are_exact_and_zeros_stay_zero():
    x = torch.full((1, 8, 4), -0.37, dtype=torch.float64)
    torch.testing.assert_close(round_to_int8(x), x, atol=2e-5, rtol=0)
    assert (round_to_int8(torch.zeros(2, 8, 4)) == 0).all()


def test_smoothing_saves_keys_with_a_large_common_part():
    q, k, v = tensors(heads=4, queries=256, dim=64)
    k = k + 40 * torch.randn(1, 4, 1, 64, generator=torch.Generator().manual_seed(2)).double()
    plan = BlockPlan.full(*uniform(256, 64))
    exact = F.scaled_dot_product_attention(q, k, v).flatten()

    def similarity(smooth):
        out = block_attention(q, k, v, plan, precision=Precision("int8", smooth), backend="torch")
        return float(F.cosine_similarity(out.flatten(), exact, dim=0))

    assert similarity(True) > 0.999
    assert similarity(False) < 0.99


def test_the_log_sum_exp_is_that_of_the_keys_given():
    q, k, v = tensors(queries=128, dim=64)
    k = k + 5.0
    _, lse = both(q, k, v, BlockPlan.full(*uniform(128, 32)), precision=INT8)
    exact = (q @ k.transpose(-1, -2) / 8).logsumexp(-1)
    torch.testing.assert_close(lse, exact, atol=0.02, rtol=0)


def test_equal_values_give_that_value():
    q, k, v = tensors(queries=100)
    out, _ = both(q, k, torch.ones_like(v), random_plan(*uniform(100, 16)), precision=INT8)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_smoothed_keys_change_no_output_where_nothing_is_rounded():
    q, k, v = tensors(batch=2, queries=75, factor=3.0)
    plan = random_plan(*uniform(75, 16))
    plain, smooth = (block_attention(q, x, v, plan, backend="torch") for x in (k + 5, smooth_keys(k + 5)))
    torch.testing.assert_close(smooth, plain, atol=1e-12, rtol=1e-12)
