"""FP8 weights and values: the Triton kernels against the specification, with conversions as a GPU makes them."""

from __future__ import annotations

import pytest
import torch
from interpreter_cases import close_to_reference
from kernel_cases import random_plan, tensors, uniform, window_plan

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import Precision, Remainder, block_attention, triton_launch
from dit_accel.kernels.triton_configs import Tile
from dit_accel.kernels.triton_fp8 import Fp8Values
from dit_accel.plan import Blocking, BlockPlan

FP8, BOTH = Precision(pv="fp8"), Precision("int8", pv="fp8")
# A weight next to the middle between two levels may fall either way in fp32, by a sixteenth of itself.
SLACK = 1e-2
pytestmark = pytest.mark.usefixtures("right_float8")


@pytest.mark.parametrize("precision", [FP8, BOTH], ids=str)
@pytest.mark.parametrize("tokens", [1, 63, 65, 130])
@pytest.mark.parametrize("size", [16, 64])
def test_lengths_around_the_block_size(precision, tokens, size):
    plan = random_plan(*uniform(tokens, size), axes=(1, 1))
    close_to_reference(*tensors(heads=1, queries=tokens), plan, slack=SLACK, precision=precision)


@pytest.mark.parametrize("rest", [None, Remainder(first_order="mixed", about="query")], ids=str)
@pytest.mark.parametrize("k_lengths", [[5, 1, 70, 12, 32, 2], [16] * 7 + [10]], ids=str)
def test_padding_and_ragged_blocks(rest, k_lengths):
    q_blocks, k_blocks = Blocking.from_lengths([3, 40, 9]), Blocking.from_lengths(k_lengths)
    q, k, v = tensors(batch=2, heads=1, queries=q_blocks.tokens, keys=k_blocks.tokens, dim=40)
    k[1, :, 50:] = v[1, :, 50:] = torch.nan
    plan = random_plan(q_blocks, k_blocks, axes=(1, 1))
    options = {"remainder": rest, "kv_len": torch.tensor([122, 50]), "precision": BOTH}
    close_to_reference(q, k, v, plan, torch.float16, SLACK, **options)


def test_an_item_without_any_key_gives_zero():
    q, k, v = tensors(batch=2, heads=1, queries=40)
    k[0] = v[0] = torch.nan
    plan = random_plan(*uniform(40, 32), axes=(1, 1))
    _, got = close_to_reference(q, k, v + 5, plan, slack=SLACK, kv_len=torch.tensor([0, 40]), precision=FP8)
    assert (got[0] == 0).all()


@pytest.mark.parametrize("precision", [FP8, Precision("int8", skip=1.0, pv="fp8")], ids=str)
def test_windows_and_skipped_tiles(precision):
    plan, _ = window_plan(*uniform(100, 16), 20)
    close_to_reference(*tensors(heads=1, queries=100, factor=3.0), plan, slack=SLACK, precision=precision)


@pytest.mark.parametrize("tile", [Tile(64, 32, 4, 2, tma=True), Tile(32, 32, 4, 1)], ids=str)
def test_every_kind_of_tile(monkeypatch, tile):
    monkeypatch.setattr(triton_launch, "choose_tile", lambda *arguments: tile)
    q, k, v = tensors(heads=1, queries=140, dim=32)
    plan = random_plan(*uniform(140, 64), axes=(1, 1))
    close_to_reference(q, k, v, plan, torch.float16, SLACK, precision=BOTH)


def test_the_order_of_the_list_hardly_matters():
    """The maximum moves by whole powers of two, so that a weight is rounded alike whatever tiles came before."""
    q, k, v = (x.float() for x in tensors(heads=1, queries=128, factor=4.0))
    plan = BlockPlan.full(*uniform(128, 32))
    out = block_attention(q, k, v, plan, backend="triton", precision=FP8)
    plan.indices.copy_(plan.indices.flip(-1))
    again = block_attention(q, k, v, plan, backend="triton", precision=FP8)
    torch.testing.assert_close(out, again, atol=2e-4, rtol=0)


@pytest.mark.parametrize("level", [0.0, 7.3])
def test_equal_values_give_that_value(level):
    q, k, v = (x.float() for x in tensors(heads=1, queries=70))
    plan = random_plan(*uniform(70, 16), axes=(1, 1))
    out = block_attention(q, k, torch.full_like(v, level), plan, backend="triton", precision=BOTH)
    torch.testing.assert_close(out, torch.full_like(v, level), atol=1e-5, rtol=0)


def test_values_are_stored_as_matrices_of_blocks():
    v = tensors(batch=2, heads=2, queries=70, dim=24)[2].float() + 3
    blocks = Blocking.from_lengths([30, 33, 7])
    made = Fp8Values.of(v, BlockPlan.full(blocks, blocks), torch.tensor([70, 40], dtype=torch.int32))
    assert made.v.shape == (2, 2, 3, 32, 64)
    for item, real in enumerate((70, 40)):
        values = v[item, :, :real]
        mean = values.mean(1)
        torch.testing.assert_close(made.mean[item, :, :24], mean)
        step = (values - mean.unsqueeze(1)).abs().amax(1) / 448 + 1e-7
        torch.testing.assert_close(made.step[item, :, :24], step)
        for j, start in enumerate(blocks.starts[:-1].tolist()):
            part = ((values - mean.unsqueeze(1)) / step.unsqueeze(1))[:, start : start + int(blocks.lengths[j])]
            stored = made.v[item, :, j].float()
            level = part.transpose(1, 2)
            assert ((stored[:, :24, : level.shape[2]] - level).abs() <= level.abs() / 15 + 2**-9).all()
            assert (stored[:, :24, level.shape[2] :] == 0).all()


def test_the_interpreter_as_it_comes_is_declined(monkeypatch):
    monkeypatch.undo()
    q, k, v = (x.float() for x in tensors(queries=40))
    with pytest.raises(UnsupportedError, match="interpreter rounds to float8_e4m3fn wrongly"):
        block_attention(q, k, v, random_plan(*uniform(40, 16)), backend="triton", precision=FP8)
