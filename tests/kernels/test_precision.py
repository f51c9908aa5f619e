"""Operands of 8 bits: the emulation against its definition, and what smoothing must and must not change."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import both, random_plan, tensors, uniform, window_plan
from torch.nn import functional as F

from dit_accel.errors import PlanError
from dit_accel.kernels import Precision, Remainder, block_attention
from dit_accel.kernels.quantize import round_to_fp8, round_to_int8, weights_in_fp8
from dit_accel.methods.registry import get_method
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import smooth_keys

INT8, FP8, BOTH = Precision("int8"), Precision(pv="fp8"), Precision("int8", pv="fp8")


@pytest.mark.parametrize(
    "precision", [INT8, Precision("int8", False), FP8, BOTH, Precision("int8", False, pv="fp8")], ids=str
)
@pytest.mark.parametrize("rest", [None, Remainder("diagonal", "block")])
@pytest.mark.parametrize("kv_len", [None, (75, 40)])
def test_the_fast_path_follows_the_definition(precision, rest, kv_len):
    q, k, v = tensors(batch=2, queries=75)
    blocks = Blocking.from_lengths([9, 16, 16, 2, 16, 16])
    options = {} if kv_len is None else {"kv_len": torch.tensor(kv_len)}
    for row, length in enumerate(kv_len or ()):
        k[row, :, length:] = v[row, :, length:] = torch.nan
    plan = random_plan(blocks, blocks)
    rounded, _ = both(q, k, v, plan, precision=precision, remainder=rest, **options)
    exact, _ = both(q, k, v, plan, remainder=rest, **options)
    assert 1e-5 < (rounded - exact).abs().max() < (0.05 if precision.pv == "input" else 0.15)


@pytest.mark.parametrize(
    "precision", [Precision(skip=1.5), Precision("int8", skip=0.0), Precision(skip=1.5, pv="fp8")], ids=str
)
@pytest.mark.parametrize("windows", [False, True])
def test_tiles_far_below_the_maximum_are_left_out(precision, windows):
    q, k, v = tensors(batch=2, queries=75, factor=3.0)
    k[:, :, 32:] *= 0.05
    k[1, :, 40:] = v[1, :, 40:] = torch.nan
    blocks = Blocking.uniform(75, 16)
    plan = window_plan(blocks, blocks, 30)[0] if windows else random_plan(blocks, blocks, share=0.8)
    options = {"precision": precision, "kv_len": torch.tensor([75, 40]), "remainder": Remainder()}
    skipped, _ = both(q, k, v, plan, **options)
    kept = block_attention(
        q, k, v, plan, backend="reference", **options | {"precision": Precision(precision.qk, pv=precision.pv)}
    )
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


@pytest.mark.parametrize("precision", [INT8, FP8, BOTH], ids=str)
@pytest.mark.parametrize("level", [0.0, 1.0, -1e4])
def test_equal_values_give_that_value(precision, level):
    q, k, v = tensors(queries=100)
    values = torch.full_like(v, level)
    out, _ = both(q, k, values, random_plan(*uniform(100, 16)), precision=precision)
    torch.testing.assert_close(out, values)


def test_values_are_rounded_to_three_bits_behind_the_first():
    x = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0)).double()
    step = x.abs().amax(1, keepdim=True) / 448 + 1e-7
    # Half a step of the last bit, or of the smallest number.
    assert ((round_to_fp8(x) - x).abs() <= (x.abs() / 16).maximum(step * 2**-10)).all()
    mantissa, _ = (round_to_fp8(x) / step).frexp()
    torch.testing.assert_close(mantissa * 16, (mantissa * 16).round())
    assert (round_to_fp8(torch.zeros(2, 8, 4)) == 0).all()


def test_weights_in_fp8_fill_the_range_and_do_not_depend_on_whole_powers_of_two():
    logits = 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).double()
    weights, total, mass = weights_in_fp8(logits)
    largest = weights.amax(-1)
    assert ((largest >= 128) & (largest <= 256)).all()
    natural = logits * math.log(2)
    torch.testing.assert_close(mass, natural.logsumexp(-1))
    exact = natural.softmax(-1)
    assert ((weights / total - exact).abs() <= exact / 15 + 2**-17).all()
    moved, _, _ = weights_in_fp8(logits + 7)
    torch.testing.assert_close(moved, weights)


def test_a_common_part_of_the_values_costs_no_accuracy():
    q, k, v = tensors(heads=4, queries=256, dim=64)
    plan = BlockPlan.full(*uniform(256, 64))
    near, far = (both(q, k, v + level, plan, precision=FP8)[0] - level for level in (0.0, 100.0))
    exact = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(near, far, atol=1e-6, rtol=0)
    assert (near - exact).square().mean() < 2e-3 * exact.square().mean()


@pytest.mark.parametrize(
    ("name", "precision"),
    [("input", None), ("int8", INT8), ("int8_fp8", BOTH)],
)
def test_names_of_precisions(name, precision):
    assert Precision.named(name) == precision
    assert get_method("composed", precision=name).precision == precision
    assert Precision.named(name, False, 2.0).skip == 2.0


def test_smoothed_keys_change_no_output_where_nothing_is_rounded():
    q, k, v = tensors(batch=2, queries=75, factor=3.0)
    plan = random_plan(*uniform(75, 16))
    plain, smooth = (block_attention(q, x, v, plan, backend="torch") for x in (k + 5, smooth_keys(k + 5)))
    torch.testing.assert_close(smooth, plain, atol=1e-12, rtol=1e-12)
