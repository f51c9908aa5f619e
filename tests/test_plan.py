"""Plans: what they select, what they cost, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import PlanError
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate

lengths = st.lists(st.integers(1, 7), min_size=1, max_size=6)


def masks(q_lengths, k_lengths, seed, axes=(2, 3)):
    q_blocks, k_blocks = Blocking.from_lengths(q_lengths), Blocking.from_lengths(k_lengths)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(*axes, q_blocks.count, k_blocks.count, generator=generator) < 0.5
    mask[..., 0] |= ~mask.any(-1)
    return mask, q_blocks, k_blocks


@settings(max_examples=60, deadline=None)
@given(lengths, lengths, st.integers(0, 99))
def test_masks_survive_a_round_trip_and_density_counts_token_pairs(q_lengths, k_lengths, seed):
    mask, q_blocks, k_blocks = masks(q_lengths, k_lengths, seed)
    plan = BlockPlan.from_mask(mask, q_blocks, k_blocks).validate()
    assert torch.equal(plan.to_mask(), mask)
    tokens = plan.to_token_mask()
    assert tokens.shape == (2, 3, sum(q_lengths), sum(k_lengths))
    assert plan.density == pytest.approx(tokens.double().mean().item())
    torch.testing.assert_close(plan.density_per_head(), tokens.double().mean((-1, -2)))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 16))
def test_segments_never_share_a_block(segments, size):
    blocks = Blocking.segments(segments, size)
    assert blocks.tokens == sum(segments)
    assert int(blocks.lengths.max()) <= size
    borders = torch.tensor(segments).cumsum(0)
    assert set(borders.tolist()) <= set(blocks.starts.tolist())
    assert blocks.count == sum(-(-n // size) for n in segments)
    assert torch.equal(blocks.block_of_token().bincount(), blocks.lengths)


def test_uniform_blocks_have_one_ragged_tail():
    blocks = Blocking.uniform(130, 64)
    assert blocks.lengths.tolist() == [64, 64, 2]
    assert blocks.is_uniform
    assert not Blocking.from_lengths([3, 64, 64], 64).is_uniform
    assert blocks.same_as(Blocking.from_lengths([64, 64, 2]))


@pytest.mark.parametrize(
    "starts", [[0], [1, 4], [0, 4, 4], [0, 5], [0, 4, 2]], ids=["none", "offset", "empty", "too long", "backwards"]
)
def test_faulty_blockings_are_refused(starts):
    with pytest.raises(PlanError):
        Blocking(torch.tensor(starts, dtype=torch.int64), 4)


def plan_of(indices, counts, **more):
    blocks = Blocking.uniform(12, 4)
    rows = torch.tensor(indices, dtype=torch.int32).view(1, 1, 3, -1)
    return BlockPlan(blocks, blocks, rows, torch.tensor(counts, dtype=torch.int32).view(1, 1, 3), **more)


@pytest.mark.parametrize(
    ("indices", "counts", "message"),
    [
        ([[0, 1], [0, 1], [0, 1]], [2, 0, 2], "counts must lie"),
        ([[0, 1], [0, 1], [0, 1]], [2, 3, 2], "counts must lie"),
        ([[0, 3], [0, 1], [0, 1]], [2, 2, 2], r"lie in \[0, 3\)"),
        ([[1, 0], [0, 1], [0, 1]], [2, 2, 2], "ascending"),
        ([[1, 1], [0, 1], [0, 1]], [2, 2, 2], "ascending"),
    ],
)
def test_validate_finds_every_fault(indices, counts, message):
    with pytest.raises(PlanError, match=message):
        plan_of(indices, counts).validate()


def test_entries_beyond_the_count_do_not_matter():
    plan = plan_of([[0, 99], [0, -5], [0, 1]], [1, 1, 2]).validate()
    assert plan.to_mask().sum() == 4
    assert plan.density == pytest.approx(4 / 9)


def test_shapes_and_types_are_checked():
    blocks = Blocking.uniform(12, 4)
    counts = torch.ones(1, 1, 3, dtype=torch.int32)
    with pytest.raises(PlanError, match="int32"):
        BlockPlan(blocks, blocks, torch.zeros(1, 1, 3, 1, dtype=torch.int64), counts)
    with pytest.raises(PlanError, match=r"\[B, H, 3, C\]"):
        BlockPlan(blocks, blocks, torch.zeros(1, 1, 2, 1, dtype=torch.int32), counts)
    with pytest.raises(PlanError, match="given together"):
        BlockPlan(blocks, blocks, torch.zeros(1, 1, 3, 1, dtype=torch.int32), counts, full_counts=counts)
    with pytest.raises(PlanError, match="at least one key block"):
        BlockPlan.from_mask(torch.zeros(3, 3, dtype=torch.bool), blocks, blocks)
    with pytest.raises(PlanError, match=r"expected \[\.\.\., 3, 3\]"):
        BlockPlan.from_mask(torch.ones(3, 2, dtype=torch.bool), blocks, blocks)


def window(tokens, reach):
    at = torch.arange(tokens, dtype=torch.int32).unsqueeze(-1)
    return BoxPredicate(at - reach, at + reach + 1, at)


def test_plans_survive_a_file(tmp_path):
    plain = plan_of([[0, 1], [1, 2], [0, 2]], [2, 2, 2])
    partial = plan_of(
        [[0, 1], [1, 0], [2, 1]], [2, 2, 2], full_counts=torch.ones(1, 1, 3, dtype=torch.int32), predicate=window(12, 2)
    )
    for plan in (plain, partial):
        plan.save(tmp_path / "plan.safetensors")
        loaded = BlockPlan.load(tmp_path / "plan.safetensors")
        assert torch.equal(loaded.to_token_mask(), plan.to_token_mask())
        assert loaded.q_blocks.same_as(plan.q_blocks)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.safetensors"]


def test_another_safetensors_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(PlanError, match="expected a dit_accel"):
        BlockPlan.load(tmp_path / "x.safetensors")


def test_partial_blocks_hold_what_the_predicate_keeps():
    plan = plan_of(
        [[0, 1], [1, 0], [2, 1]], [2, 2, 2], full_counts=torch.ones(1, 1, 3, dtype=torch.int32), predicate=window(12, 2)
    )
    mask = plan.to_token_mask()[0, 0]
    assert mask[:4, :4].all()
    assert mask[3, 4:8].tolist() == [True, True, False, False]
    assert mask[4, :4].tolist() == [False, False, True, True]


def test_a_stride_is_a_dilated_window():
    at = torch.arange(10, dtype=torch.int32).unsqueeze(-1)
    box = BoxPredicate(at - 4, at + 5, at, (2,))
    assert box.keeps(torch.tensor([5]), torch.arange(10))[0].nonzero().flatten().tolist() == [1, 3, 5, 7, 9]
    with pytest.raises(PlanError, match="must agree"):
        BoxPredicate(at, at, at, (1, 1))
