"""Summary tiles, INT8 operands and the statistics behind them: the Triton kernels against the specification."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreter_cases import close_to_reference
from kernel_cases import random_plan, tensors, uniform, window_plan
from torch.nn import functional as F

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import Precision, Remainder, block_attention, triton_backend, triton_launch
from dit_accel.kernels.quantize import round_to_int8
from dit_accel.kernels.triton_configs import Tile
from dit_accel.kernels.triton_int8 import Int8Operands
from dit_accel.kernels.triton_rest import Rest
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate
from dit_accel.state import CallContext

ORDERS = ("none", "global", "grouped")
EVERY = [Remainder(mass, order, 3) for mass in ("mean", "diagonal") for order in ORDERS]
SEEN = [Remainder(first_order=order, group=3, about="query") for order in ("mixed", *ORDERS)]
MIXED = [Remainder(mass, "mixed") for mass in ("mean", "diagonal")]


def small(batch=1, heads=1, tokens=110, size=16, **options):
    q, k, v = tensors(batch=batch, heads=heads, queries=tokens, **options)
    q_blocks, k_blocks = Blocking.uniform(tokens, 64), Blocking.uniform(tokens, size)
    return q, k, v, random_plan(q_blocks, k_blocks, axes=(1, heads))


@pytest.mark.parametrize("rest", EVERY + SEEN + MIXED, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_follows_the_definition(rest, dtype):
    close_to_reference(*small(), dtype, remainder=rest)


@pytest.mark.parametrize("rest", EVERY[:1] + EVERY[-1:] + SEEN[:2] + MIXED[1:], ids=str)
def test_padding_and_ragged_blocks(rest):
    q_blocks, k_blocks = Blocking.from_lengths([3, 40, 9]), Blocking.from_lengths([5, 1, 70, 12, 32, 2])
    q, k, v = tensors(batch=2, heads=1, queries=q_blocks.tokens, keys=k_blocks.tokens, dim=24)
    k[1, :, 50:] = v[1, :, 50:] = torch.nan
    plan = random_plan(q_blocks, k_blocks, axes=(1, 1))
    close_to_reference(q, k, v, plan, remainder=rest, kv_len=torch.tensor([122, 50]))


@pytest.mark.parametrize("rest", EVERY[1:] + SEEN + MIXED[1:], ids=str)
def test_more_summaries_than_a_tile_holds(monkeypatch, rest):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: Tile(64, 16, 4, 1))
    close_to_reference(*small(tokens=90, size=2), remainder=rest)


def test_windows_with_a_remainder():
    plan, _ = window_plan(*uniform(100, 32), 20)
    close_to_reference(*tensors(heads=1, queries=100), plan, remainder=EVERY[-1])


@pytest.mark.parametrize("rest", EVERY + SEEN[:1] + SEEN[2:], ids=str)
def test_every_accumulator_follows_the_maximum_of_the_summaries(rest):
    """Only the weakest block is exact, so the maximum moves when the summaries come."""
    q, k, v = tensors(heads=1, queries=64, factor=8.0)
    weakest = (q.mean(2, keepdim=True) @ k.transpose(-1, -2)).view(8, 8).sum(-1).argmin()
    mask = torch.zeros(1, 8, dtype=torch.bool)
    mask[:, weakest] = True
    plan = BlockPlan.from_mask(mask, Blocking.uniform(64, 64), Blocking.uniform(64, 8))
    close_to_reference(q, k, v, plan, slack=1e-4, remainder=rest)


@pytest.mark.parametrize("rest", EVERY[:1] + EVERY[-1:], ids=str)
def test_nothing_remains_of_the_full_plan(rest):
    q, k, v = (x.float() for x in tensors(heads=1, queries=60))
    plan = BlockPlan.full(*uniform(60, 32))
    out = block_attention(q, k, v, plan, remainder=rest, backend="triton")
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=2e-6, rtol=0)


def test_an_item_without_any_key_gives_zero():
    q, k, v, plan = small(batch=2, tokens=40)
    out, lse = block_attention(
        *(x.float() for x in (q, k, v)),
        plan,
        remainder=EVERY[-1],
        kv_len=torch.tensor([0, 40]),
        return_lse=True,
        backend="triton",
    )
    assert (out[0] == 0).all()
    assert lse[0].isneginf().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize("rest", EVERY[:1] + EVERY[1:2], ids=str)
@pytest.mark.parametrize("valid", [None, 77])
def test_descriptors_read_keys_and_means_from_one_copy(monkeypatch, rest, valid):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: Tile(64, 32, 4, 2, tma=True))
    q, k, v, plan = small(tokens=110, size=32, dim=24)
    options = {}
    if valid is not None:
        k[:, :, valid:] = v[:, :, valid:] = torch.nan
        options["kv_len"] = torch.tensor([valid])
    close_to_reference(q, k, v, plan, torch.float16, remainder=rest, **options)


@pytest.mark.parametrize(
    ("rest", "words"),
    [
        (Remainder(first_order="block"), "costs as much as dense attention"),
        (Remainder(first_order="block", about="query"), "costs as much as dense attention"),
    ],
    ids=str,
)
def test_what_the_kernel_lacks_is_declined_with_the_reason(rest, words):
    q, k, v, plan = small()
    with pytest.raises(UnsupportedError, match=words):
        block_attention(*(x.float() for x in (q, k, v)), plan, remainder=rest, backend="triton")


@pytest.mark.parametrize("mass", ["mean", "diagonal"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kv_len", [None, (100, 37)])
def test_one_pass_gives_the_statistics_of_the_blocks(mass, order, kv_len):
    lengths = [5, 70, 1, 20, 4]
    blocks = Blocking.from_lengths(lengths)
    _, k, v = (x.float() for x in tensors(batch=2, heads=1, queries=100, dim=24))
    real = torch.tensor(kv_len or (100, 100))
    plan = BlockPlan.full(blocks, blocks)
    rest = Rest.of(k, v, plan, Remainder(mass, order, 2), None if kv_len is None else real.int())
    for item in range(2):
        start, deltas, tokens = 0, [], []
        for j, length in enumerate(lengths):
            inside = slice(start, max(start, min(start + length, int(real[item]))))
            n = inside.stop - inside.start
            keys, values = k[item, 0, inside], v[item, 0, inside]
            mean = keys.mean(0) if n else torch.zeros(24)
            torch.testing.assert_close(rest.mean_k[item, 0, j, :24], mean)
            torch.testing.assert_close(rest.mean_v[item, 0, j, :24], values.mean(0) if n else torch.zeros(24))
            assert 2 ** rest.log_tokens[item if kv_len else 0, j] == pytest.approx(n)
            if rest.variance is not None:
                wanted = keys.var(0, correction=0) if n else torch.zeros(24)
                torch.testing.assert_close(rest.variance[item, 0, j, :24], wanted, atol=1e-5, rtol=1e-5)
            deltas.append((keys - mean).T @ values)
            tokens.append(n)
            start += length
        if order != "none":
            size = 5 if order == "global" else 2
            for g in range(0, 5, size):
                wanted = sum(deltas[g : g + size]) / max(1, sum(tokens[g : g + size]))
                torch.testing.assert_close(rest.moments[item, 0, g // size, :24, :24], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("windows", [False, True])
def test_heads_in_groups_give_what_all_together_give(monkeypatch, windows):
    q, k, v = (x.float() for x in tensors(batch=2, heads=3, queries=70))
    plan = random_plan(*uniform(70, 16), axes=(1, 3))
    if windows:
        coordinates = torch.arange(70, dtype=torch.int32).view(1, 1, 70, 1).expand(1, 3, 70, 1)
        reach = torch.tensor([9, 20, 33], dtype=torch.int32).view(1, 3, 1, 1)
        box = BoxPredicate(coordinates - reach, coordinates + reach, coordinates.contiguous())
        plan = replace(plan, full_counts=torch.zeros_like(plan.counts), predicate=box)
    options = {"remainder": SEEN[0], "return_lse": True}
    together = block_attention(q, k, v, plan, backend="triton", **options)
    monkeypatch.setattr(triton_backend, "_LARGEST_TEMPORARY", 1)
    alone = block_attention(q, k, v, plan, backend="triton", **options)
    torch.testing.assert_close(alone, together, rtol=0, atol=0)


@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("rest", [None, EVERY[-1], SEEN[0]], ids=str)
def test_quantised_queries_and_keys_follow_the_definition(smooth, rest):
    q, k, v, plan = small(batch=2, tokens=75)
    k[1, :, 40:] = v[1, :, 40:] = torch.nan
    options = {"kv_len": torch.tensor([75, 40]), "remainder": rest, "precision": Precision("int8", smooth)}
    # Ties of rounding may fall either way in fp32, which moves a logit by one step.
    close_to_reference(q, k, v, plan, slack=2e-4, **options)


@pytest.mark.parametrize("precision", [Precision(skip=1.5), Precision("int8", skip=0.5)], ids=str)
@pytest.mark.parametrize("rest", [None, SEEN[0]], ids=str)
def test_tiles_far_below_the_maximum_are_left_out(precision, rest):
    q, k, v = tensors(heads=1, queries=75, factor=3.0)
    k[:, :, 32:] *= 0.05
    plan = random_plan(*uniform(75, 16), axes=(1, 1), share=0.8)
    options = {"kv_len": torch.tensor([70]), "remainder": rest}
    skipped, _ = close_to_reference(q, k, v, plan, slack=1e-3, precision=precision, **options)
    kept = block_attention(*(x.float().double() for x in (q, k, v)), plan, backend="reference", **options)
    assert (skipped - kept).abs().max() > 1e-2


@pytest.mark.parametrize("precision", ["input", "int8"])
def test_a_method_may_ask_for_it(precision):
    layout = TokenLayout((1, 1, 75), valid=(66,))
    q, k, v = (x.float() for x in tensors(heads=1, queries=75, factor=3.0))
    k[:, :, 32:] *= 0.05
    k[:, :, 66:] = v[:, :, 66:] = torch.nan
    parameters = {"block": 16, "key_block": 16, "density": 0.8, "order": "raster", "precision": precision}
    method = get_method("sparge", pv_threshold=2.0, **parameters)
    plan, call = method.plan(layout, q, k, v)[1], CallContext(layout)
    out, wanted = (method.compute(q, k, v, plan, call, backend=name) for name in ("triton", "reference"))
    torch.testing.assert_close(out, wanted, atol=1e-3, rtol=1e-3)
    kept = get_method("sparge", **parameters).compute(q, k, v, plan, call, backend="reference")
    assert (wanted - kept).abs().max() > 1e-2


def test_partial_blocks_are_left_out_too():
    """Blocks no longer than the tiles of partial blocks, so that both mean the same by a tile."""
    plan, _ = window_plan(*uniform(75, 16), 30)
    q, k, v = tensors(heads=1, queries=75, factor=3.0)
    k[:, :, 32:] *= 0.05
    close_to_reference(q, k, v, plan, slack=1e-3, precision=Precision(skip=1.5))


def test_quantisation_rounds_half_away_from_zero_with_one_scale_per_block():
    q, k, _, plan = small(tokens=70, dim=24)
    operands = Int8Operands.of(q.float(), k.float(), plan, 1.0, smooth=False, kv_len=None)
    for x, levels, step, blocks in (
        (q, operands.q, operands.q_step, plan.q_blocks),
        (k, operands.k, operands.k_step, plan.k_blocks),
    ):
        wide = step.double().repeat_interleave(blocks.lengths, -1).unsqueeze(-1) * levels
        parts = x.split(blocks.lengths.tolist(), 2)
        torch.testing.assert_close(wide, torch.cat([round_to_int8(p) for p in parts], 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tile", [Tile(64, 32, 4, 2, tma=True), Tile(64, 64, 4, 2)], ids=str)
def test_quantised_tiles_of_every_kind(monkeypatch, tile):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: tile)
    q, k, v, plan = small(tokens=110, size=64, dim=32)
    close_to_reference(q, k, v, plan, slack=2e-4, precision=Precision("int8"))
