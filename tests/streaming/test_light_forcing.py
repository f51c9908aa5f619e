"""Light Forcing: sparsity that grows with the stream, and its choice of frames and blocks."""

from __future__ import annotations

import pytest
import torch
from policy_cases import TOKENS, call_for, dense, drive, tensors
from stream_cases import text, tiny_transformer

from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.light_forcing import LightForcing, chunk_sparsity
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.plan import BlockPlan


def test_worked_example_of_the_growth():
    got = [chunk_sparsity(c, 3, 0.95, 0.85) for c in range(3, 22, 3)]
    assert got == pytest.approx([0, 0.797, 0.825, 0.842, 0.853, 0.862, 0.868], abs=5e-4)


@pytest.mark.parametrize("window", [None, 12])
def test_growth_spends_the_budget_of_the_target(window):
    ends = range(6, 22, 3)
    seen = [c if window is None else min(c, window) for c in ends]
    free = [chunk_sparsity(c, 3, 0.9, 0.7) for c in ends]
    assert free == sorted(free)
    if window is None:
        spent = sum((1 - s) * keys for s, keys in zip(free, seen, strict=True))
        assert spent == pytest.approx(0.3 * sum(seen), rel=1e-6)
    assert chunk_sparsity(999, 3, 0.9, 0.7, window=window) == chunk_sparsity(
        21 if window is None else 12, 3, 0.9, 0.7, window=window
    )
    assert {chunk_sparsity(c, 3, 0.8, 0.8) for c in ends} == {0.8}
    assert {chunk_sparsity(c, 3, 0.0, 0.0) for c in ends} == {0.0}


def select(policy, rotary, q, k, frames=range(9), own=range(6, 9), sparsity=0.7):
    plan = policy.plan(call_for(rotary, frames, own), q, k, sparsity).validate()
    per_frame = -(-TOKENS // policy.block)
    return plan, plan.to_mask().unflatten(-1, (len(frames), per_frame))


def test_selection_keeps_what_must_be_kept_and_the_budget(rotary):
    policy = LightForcing(top_frames=2, block=10)
    q, k, _ = tensors(3, 9)
    plan, mask = select(policy, rotary, q, k)
    past = mask[..., :6, :]
    assert mask[..., 6:, :].all()
    assert past[..., [0, 4, 5], :].any(-1).all()
    assert (past.any(-1).sum(-1) <= 5).all()
    assert (past.sum((-2, -1)) == round(0.3 * 6 * 5)).all()
    assert plan.q_blocks.lengths.tolist() == [10, 10, 10, 10, 2] * 3
    # A budget smaller than what is guaranteed gives one block of each fixed frame.
    tight = select(policy, rotary, q, k, sparsity=0.999)[1][..., :6, :]
    assert (tight.sum((-2, -1)) == 3).all()


def test_all_frames_and_all_blocks_are_dense_attention(rotary):
    q, k, v = tensors(3, 9)
    policy = LightForcing(top_frames=6, block=10)
    plan, mask = select(policy, rotary, q, k, sparsity=0.0)
    assert mask.all()
    full = BlockPlan.full(plan.q_blocks, plan.k_blocks)
    assert torch.equal(plan.to_mask(), full.to_mask().expand_as(plan.to_mask()))
    out = block_attention(*(x.transpose(1, 2) for x in (q, k, v)), plan).transpose(1, 2)
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=0)


def test_a_planted_block_is_found_and_only_in_its_frame(rotary):
    q = torch.zeros(1, 3 * TOKENS, 1, 24)
    q[..., 0] = 4.0
    k = torch.zeros(1, 9 * TOKENS, 1, 24)
    k[:, 2 * TOKENS + 10 : 2 * TOKENS + 20, :, 0] = 5.0
    k[:, 3 * TOKENS : 4 * TOKENS, :, 0] = 1.0
    policy = LightForcing(top_frames=2, sink_frames=0, recent_frames=0, block=10)
    keep = 1 - 1.01 / 30
    _, mask = select(policy, rotary, q, k, sparsity=keep)
    assert mask[..., :6, :].nonzero()[:, -2:].unique(dim=0).tolist() == [[2, 1]]


def test_selection_does_not_depend_on_where_frames_are_stored(rotary):
    q, k, _ = tensors(3, 9)
    policy = LightForcing(top_frames=3, block=10)
    order = [4, 0, 6, 7, 8, 5, 3, 1, 2]
    _, plain = select(policy, rotary, q, k)
    _, moved = select(policy, rotary, q, k.unflatten(1, (9, -1))[:, order].flatten(1, 2), frames=tuple(order))
    assert torch.equal(moved, plain[..., order, :])


@pytest.mark.parametrize("positions", ["absolute", "reindex"])
def test_kept_block_keys_are_those_pooled_from_scratch(positions):
    runtime = CausalWan(tiny_transformer(layers=1, frames=200))
    seen = []

    class Checked(LightForcing):
        def _block_keys(self, call, k):
            got = super()._block_keys(call, k)
            scratch = LightForcing(block=self.block)._block_keys(call, k)
            seen.append(float((got - scratch).abs().max()))
            assert len(self._pooled.get(call.layer, {})) <= 8
            return got

    changes = {"positions": positions, "steps": (1000.0,), "chunk": 2}
    _, driver = drive(lambda: Checked(block=4), count=60, runtime=runtime, **changes)
    assert len(seen) == 59
    assert max(seen) < 1e-5
    driver.switch(text(1))
    assert driver.branches[0].policy.bytes > 0


def test_the_first_chunk_is_dense_and_later_ones_are_not():
    plain, _ = drive(DenseContext)
    sparse, _ = drive(lambda: LightForcing(block=2, top_frames=2))
    assert torch.equal(sparse[:, :, :2], plain[:, :, :2])
    assert (sparse[:, :, 2:] - plain[:, :, 2:]).abs().max() > 1e-4
    none, _ = drive(lambda: LightForcing(0.0, 0.0))
    assert torch.equal(none, plain)


def test_wrong_sparsities_are_named():
    with pytest.raises(ConfigError, match="target <= base"):
        LightForcing(base=0.5, target=0.6)
