"""Scorers and their methods against the definitions, token by token."""

from __future__ import annotations

import math

import dynamic_cases as cases
import pytest
import torch

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.tiles import tile_blocks
from dit_accel.plan import Blocking
from dit_accel.selection import pooled_scores, self_similarity, smooth_keys
from dit_accel.selection.samples import sampled_scores
from dit_accel.selection.scores import (
    antidiagonal_scores,
    block_mass,
    block_sums,
    subblock_scores,
)

LAYOUT = cases.LAYOUTS["text after"]


def exact_mass(q, k, rows, columns, layout):
    """Block sums of the softmax, token by token."""
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).double()
    for item, length in enumerate(layout.valid or [layout.tokens] * len(q)):
        weights[item, :, :, length:] = -torch.inf
    weights = weights.softmax(-1)
    for item, length in enumerate(layout.valid or []):
        weights[item, :, length:] = 0
    total = torch.zeros(*q.shape[:2], rows.count, columns.count, dtype=torch.float64)
    for i in range(rows.count):
        for j in range(columns.count):
            part = weights[:, :, rows.starts[i] : rows.starts[i + 1], columns.starts[j] : columns.starts[j + 1]]
            total[:, :, i, j] = part.sum((-1, -2))
    return total


@pytest.mark.parametrize("blocks", ["uniform", "tiles"])
def test_block_mass_is_the_block_sum_of_the_softmax(blocks, monkeypatch):
    monkeypatch.setattr("dit_accel.selection.scores._ELEMENTS", 1)
    rows = LAYOUT.blocks(16) if blocks == "uniform" else tile_blocks(LAYOUT, (2, 2, 4))
    columns = LAYOUT.blocks(9)
    q, k, _ = cases.tensors(LAYOUT)
    mass, lse = block_mass(q, k, rows, columns, LAYOUT)
    expected = exact_mass(q, k, rows, columns, LAYOUT)
    torch.testing.assert_close(mass.double(), expected, atol=1e-5, rtol=1e-4)
    assert mass[0].sum((-1, -2)).tolist() == pytest.approx([116.0, 116.0])
    again, _ = block_mass(q, k, rows, columns, LAYOUT, lse)
    torch.testing.assert_close(again, mass)
    shifted, _ = block_mass(q, k, rows, columns, LAYOUT, lse + 3)
    torch.testing.assert_close(shifted * math.exp(3), mass)


def test_block_sums_of_any_partition():
    x = torch.arange(30.0).view(2, 15)
    for blocks in (Blocking.uniform(15, 4), Blocking.from_lengths([1, 5, 2, 7])):
        expected = torch.stack([p.sum(-1) for p in x.split(blocks.lengths.tolist(), -1)], -1)
        assert torch.equal(block_sums(x, blocks), expected)


def test_antidiagonals_of_stride_one_are_the_exact_mass():
    q, k, _ = cases.tensors(LAYOUT)
    rows, columns = LAYOUT.blocks(16), LAYOUT.blocks(9)
    scores = antidiagonal_scores(q, k, rows, columns, LAYOUT, 1)
    expected = exact_mass(q, k, rows, columns, LAYOUT)
    torch.testing.assert_close(scores[0].exp().double(), expected[0], atol=1e-5, rtol=1e-4)


def antidiagonal_mass(q, k, size, stride):
    """The published definition, group by group, for a whole number of blocks."""
    groups = q.shape[2] // stride
    logits = torch.zeros(*q.shape[:2], groups, groups)
    for a in range(groups):
        for c in range(groups):
            for i in range(stride):
                query, key = q[:, :, a * stride + stride - 1 - i], k[:, :, c * stride + i]
                logits[:, :, a, c] += (query * key).sum(-1) / stride / q.shape[-1] ** 0.5
    shares = logits.softmax(-1).unflatten(-1, (-1, size // stride)).sum(-1)
    return shares.unflatten(2, (-1, size // stride)).sum(3)


def test_antidiagonals_are_those_of_the_definition_and_independent_of_chunks(monkeypatch):
    layout = TokenLayout((2, 4, 8))
    q, k, _ = cases.tensors(layout)
    blocks = layout.blocks(16)
    expected = antidiagonal_mass(q, k, 16, 4)
    scores = antidiagonal_scores(q, k, blocks, blocks, layout, 4)
    torch.testing.assert_close(scores.exp(), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.exp().sum(-1), torch.full((2, 2, 4), 4.0))
    monkeypatch.setattr("dit_accel.selection.scores._ELEMENTS", 1)
    torch.testing.assert_close(antidiagonal_scores(q, k, blocks, blocks, layout, 4), scores)


def test_a_constant_added_to_all_keys_changes_no_score():
    q, k, _ = cases.tensors(LAYOUT)
    blocks = LAYOUT.blocks(16)
    shift = torch.randn(1, 2, 1, 16, generator=torch.Generator().manual_seed(1))
    for score in (
        lambda k: antidiagonal_scores(q, k, blocks, blocks, LAYOUT, 4).softmax(-1),
        lambda k: pooled_scores(q, smooth_keys(k, LAYOUT.valid), blocks, LAYOUT).softmax(-1),
        lambda k: sampled_scores(q, k, blocks, blocks, LAYOUT, (4, 16), torch.Generator().manual_seed(0)),
    ):
        before, after = score(k), score(k + shift)
        alive = LAYOUT.blocks(16).starts[:-1] < 109
        torch.testing.assert_close(before[:, :, alive], after[:, :, alive], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pattern", ["stripe", "slash"])
def test_antidiagonals_meet_stripes_and_slashes(pattern):
    layout = TokenLayout((1, 8, 16))
    q = torch.zeros(1, 1, 128, 128)
    k = torch.zeros(1, 1, 128, 128)
    if pattern == "stripe":
        q[..., 0], k[:, :, 37, 0] = 40.0, 4.0
        expected = torch.full((8,), 2)
    else:
        token = torch.arange(128)
        q[0, 0, token, token], k[0, 0, (token + 49) % 128, token] = 40.0, 4.0
        expected = (torch.arange(8) + 3) % 8
    blocks = layout.blocks(16)
    best = antidiagonal_scores(q, k, blocks, blocks, layout, 8)[0, 0].argmax(-1)
    assert torch.equal(best, expected)


def test_xattention_threshold():
    layout = TokenLayout((4, 8, 8))
    q, k, _ = cases.tensors(layout)
    masks = [cases.video_mask(get_method("xattention", threshold=t, block=16), layout, q, k) for t in (0.3, 0.6, 0.9)]
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()
    assert masks[0].sum() < masks[1].sum() < masks[2].sum()
    blocks = layout.blocks(16)
    share = antidiagonal_scores(q, k, blocks, blocks, layout, 16).softmax(-1)
    assert ((share * masks[1]).sum(-1) >= 0.6 - 1e-6).all()
    per_head = cases.video_mask(get_method("xattention", threshold=[0.3, 0.9], block=16), layout, q, k)
    assert torch.equal(per_head[:, 0], masks[0][:, 0])
    assert torch.equal(per_head[:, 1], masks[2][:, 1])
    assert cases.video_mask(get_method("xattention", threshold=1.0, block=16), layout, q, k).all()
    with pytest.raises(ConfigError, match="one per head"):
        get_method("xattention", threshold=[0.5, 0.5, 0.5]).plan(layout, q, k)


def test_subblocks_are_the_log_sum_exp_over_pairs_of_means(monkeypatch):
    q, k, _ = cases.tensors(LAYOUT)
    rows, columns = LAYOUT.blocks(16), LAYOUT.blocks(12)
    monkeypatch.setattr("dit_accel.selection.scores._ELEMENTS", 1)
    scores = subblock_scores(q, k, rows, columns, LAYOUT, 4, 3)
    starts, ends = rows.starts.tolist(), columns.starts.tolist()
    for item, length in enumerate(LAYOUT.valid):
        for i, j in ((0, 0), (3, 5), (2, columns.count - 1)):
            total = 0
            for a in range(starts[i], min(starts[i + 1], length), 4):
                for b in range(ends[j], min(ends[j + 1], length), 4):
                    queries = q[item, 0, a : min(a + 4, starts[i + 1], length)]
                    keys = k[item, 0, b : min(b + 4, ends[j + 1], length)]
                    logit = queries.mean(0) @ keys.mean(0) / 4
                    total += len(queries) * len(keys) * torch.exp(logit)
            assert scores[item, 0, i, j] == pytest.approx(float(torch.log(total)), abs=1e-4)
    plain = subblock_scores(q, k, rows, columns, LAYOUT, 1, 1).softmax(-1)
    torch.testing.assert_close(plain[:, :, :7], pooled_scores(q, k, rows, LAYOUT, columns).softmax(-1)[:, :, :7])


def test_subblocks_of_one_token_rank_by_the_exact_unnormalised_mass():
    layout = TokenLayout((2, 4, 4))
    q, k, _ = cases.tensors(layout)
    blocks = layout.blocks(8)
    scores = subblock_scores(q, k, blocks, blocks, layout, 8, 8)
    logits = (q @ k.transpose(-1, -2) / 4).unflatten(-1, (4, 8)).unflatten(2, (4, 8))
    torch.testing.assert_close(scores, logits.logsumexp((3, 5)))


def test_sampled_scores_with_all_tokens_are_the_largest_logits():
    layout = TokenLayout((2, 4, 5))
    q, k, _ = cases.tensors(layout)
    blocks = layout.blocks(8)
    scores = sampled_scores(q, k, blocks, blocks, layout, (8, 8), torch.Generator().manual_seed(0))
    logits = q @ k.transpose(-1, -2) / 4
    expected = (logits - logits.amax(-1, keepdim=True)).unflatten(-1, (5, 8)).amax(-1).unflatten(2, (5, 8)).amax(3)
    torch.testing.assert_close(scores, expected)
    assert (scores <= 0).all()
    assert torch.equal(scores.amax(-1), torch.zeros(2, 2, 5))
    part = sampled_scores(q, k, blocks, blocks, layout, (2, 2), torch.Generator().manual_seed(0))
    assert not torch.equal(part, scores)


def test_sampled_places_lie_on_real_tokens():
    q, k, _ = cases.tensors(LAYOUT)
    k[1, :, 109:] = torch.nan
    blocks = LAYOUT.blocks(16)
    scores = sampled_scores(q, k, blocks, blocks, LAYOUT, (4, 4), torch.Generator().manual_seed(0))
    assert not scores.isnan().any()
    assert torch.equal(scores[:, 0, 0].isneginf(), blocks.starts[:-1] >= torch.tensor([[116], [109]]))


def sparge_mask(q, k, rows, columns, similarity, keep=None, mass=None):
    """The published rule, row by row, for one batch item of whole blocks."""
    q_mean, k = q.unflatten(1, (-1, rows)), k - k.mean(1, keepdim=True)
    k_mean = k.unflatten(1, (-1, columns))
    alike = []
    for x in (q_mean, k_mean):
        unit = torch.nn.functional.normalize(x, dim=-1)
        alike.append((unit @ unit.transpose(-1, -2)).mean((-1, -2)) > similarity)
    scores = q_mean.mean(2) @ k_mean.mean(2).transpose(-1, -2) / q.shape[-1] ** 0.5
    scores = scores.masked_fill(~alike[1].unsqueeze(1), -torch.inf).softmax(-1)
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for head, row in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).tolist():
        ranked = scores[head, row].argsort(descending=True)
        number = int(keep * scores.shape[2]) if keep else int((scores[head, row][ranked].cumsum(0) <= mass).sum())
        mask[head, row, ranked[: max(1, number)]] = True
    return mask | ~alike[0].unsqueeze(-1) | ~alike[1].unsqueeze(1)


@pytest.mark.parametrize("shape", [(32, 16), (16, 32)])
@pytest.mark.parametrize("rule", [{"keep": 0.3}, {"mass": 0.7}])
def test_sparge_is_its_definition(shape, rule):
    layout = TokenLayout((4, 8, 8))
    q, k, _ = cases.tensors(layout, batch=1)
    k[:, 0, 64:96] = torch.randn(32, 16, generator=torch.Generator().manual_seed(5))
    similarity = float(self_similarity(smooth_keys(k), layout.blocks(shape[1])).mean())
    method = get_method(
        "sparge",
        block=shape[0],
        key_block=shape[1],
        similarity=similarity,
        density=rule.get("keep"),
        mass=rule.get("mass", 0.97),
    )
    expected = sparge_mask(q[0], k[0], *shape, similarity, **rule)
    assert torch.equal(cases.video_mask(method, layout, q, k)[0], expected)
    assert 0.05 < expected.float().mean() < 0.95


def test_the_gate_keeps_blocks_whose_tokens_disagree():
    layout = TokenLayout((1, 8, 16))
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 8, 1, 32, generator=generator).expand(-1, -1, -1, -1, 16, -1).flatten(3, 4)
    k = k.clone()
    k[:, :, 32:48] = torch.randn(16, 32, generator=generator)
    gated, off, released, closed = (
        cases.video_mask(get_method("sparge", block=16, key_block=16, density=0.125, similarity=s), layout, q, k)
        for s in (0.5, -1.0, -0.1, 1.0)
    )
    assert gated[..., 2].all()
    assert not off[..., 2].all()
    assert torch.equal(off, released)
    assert closed.all()


def test_int8_of_sparge_stays_close():
    layout = TokenLayout((4, 8, 8))
    q, k, v = torch.randn(3, 1, 2, 256, 64, generator=torch.Generator().manual_seed(0))
    parameters = {"density": 0.5, "similarity": -1.0}
    plain = cases.attend(get_method("sparge", **parameters), layout, q, k, v)
    rounded = cases.attend(get_method("sparge", precision="int8", **parameters), layout, q, k, v)
    assert 1e-5 < (plain - rounded).abs().sum() / plain.abs().sum() < 0.02
