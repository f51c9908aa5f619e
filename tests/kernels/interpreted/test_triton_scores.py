"""Scores of pairs of blocks in Triton against their definitions, slot by slot in fp64, and against plain torch."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_cases import tensors

from dit_accel.kernels import block_scores, operations
from dit_accel.kernels.block_scores import Slots, max_slots, score_blocks
from dit_accel.kernels.operations import uses_triton
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection import pooled_scores, samples, scores
from dit_accel.selection.samples import largest_weights, probe_profiles, sampled_scores
from dit_accel.selection.scores import antidiagonal_scores, block_mass, subblock_scores

UNEQUAL = [16, 3, 16, 9, 1]
CASES = [
    ([16, 16, 16, 13], None),  # a ragged tail
    (UNEQUAL, None),
    (UNEQUAL, (45, 18)),  # one item ends within a block
]


# The logarithm of a sum of nothing is -inf, as it should be.
pytestmark = pytest.mark.filterwarnings("ignore:divide by zero")


@pytest.fixture
def plain(monkeypatch):
    """A way to have everything computed in plain torch, which is barred before."""
    modules, torch_form = (scores, samples), scores.KeyMatrix
    for module in modules:
        monkeypatch.setattr(module, "KeyMatrix", None)

    def switch():
        for module in modules:
            monkeypatch.setattr(module, "KeyMatrix", torch_form)
        monkeypatch.setattr(operations, "why_not_on", lambda device, dtype: "switched off")

    return switch


def inputs(lengths, valid, dtype=torch.float32, dim=24):
    """Queries and keys with a mean, tokens of a head side by side or apart, and no numbers where nothing is real."""
    q, k, _ = (x.to(dtype) for x in tensors(batch=2, queries=sum(lengths), dim=dim))
    k = k + 1
    if valid is not None:
        for item, length in enumerate(valid):
            q[item, :, length:] = k[item, :, length:] = torch.nan
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k, Blocking.from_lengths(lengths), TokenLayout((1, 1, sum(lengths)), valid=valid)


def groups(x, blocks, real, size):
    """The groups of each block of one head `[N, D]`: tokens `[size, D]`, missing ones at the mean, and their share."""
    found = []
    for start, length in zip(blocks.starts.tolist(), blocks.lengths.tolist(), strict=False):
        tokens = x[start : max(start, min(start + length, real))].double()
        parts = [tokens[i : i + size] for i in range(0, len(tokens), size)]
        found.append(
            [(torch.cat([p, p.mean(0, keepdim=True).expand(size - len(p), -1)]), len(p) / size) for p in parts]
        )
    return found


def antidiagonals(q, k, blocks, valid, stride):
    """`[B, H, n, n]` from the definition: ln of the weighted sums of softmax rows, token by token."""
    n, scores = blocks.count, torch.full((*q.shape[:2], blocks.count, blocks.count), -torch.inf, dtype=torch.float64)
    for item in range(q.shape[0]):
        real = q.shape[2] if valid is None else valid[item]
        for head in range(q.shape[1]):
            rows, columns = (groups(x[item, head], blocks, real, stride) for x in (q, k))
            for i in range(n):
                mass = torch.zeros(n, dtype=torch.float64)
                for query, share in rows[i]:
                    weights = torch.zeros(n, dtype=torch.float64)
                    for j in range(n):
                        for key, part in columns[j]:
                            logit = sum(query[t] @ key[stride - 1 - t] for t in range(stride)) / stride
                            weights[j] += part * math.exp(logit / math.sqrt(q.shape[-1]))
                    mass += share * weights / weights.sum()
                seen = torch.tensor([bool(part) for part in columns])
                scores[item, head, i, seen] = mass.clamp(min=torch.finfo(torch.float32).tiny).log()[seen]
    return scores


@pytest.mark.parametrize(("lengths", "valid"), CASES)
@pytest.mark.parametrize(("stride", "dtype"), [(4, torch.float32), (5, torch.float16), (1, torch.float32)])
def test_antidiagonals_are_those_of_the_definition(lengths, valid, stride, dtype):
    q, k, blocks, layout = inputs(lengths, valid, dtype)
    assert uses_triton("block scores", q)
    got = antidiagonal_scores(q, k, blocks, blocks, layout, stride)
    assert got.dtype == torch.float32
    wanted = antidiagonals(q, k, blocks, valid, stride)
    exact = 2e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(got.double(), wanted, atol=exact, rtol=exact)


@pytest.mark.parametrize(("lengths", "valid"), CASES[1:])
@pytest.mark.parametrize("parts", [(4, 3), (1, 5)])
def test_pairs_of_sub_blocks_are_the_same_as_in_torch(plain, lengths, valid, parts):
    q, k, blocks, layout = inputs(lengths, valid, torch.float16)
    got = subblock_scores(q, k, blocks, blocks, layout, *parts)
    plain()
    wanted = subblock_scores(q.double(), k.double(), blocks, blocks, layout, *parts)
    torch.testing.assert_close(got.double(), wanted, atol=2e-5, rtol=2e-5)


def test_scores_of_means_are_the_same_as_in_torch(plain):
    q, k, blocks, layout = inputs(UNEQUAL, (45, 18))
    wide = Blocking.from_lengths([19, 26])
    got = pooled_scores(q, k, wide, layout, blocks)
    plain()
    wanted = pooled_scores(q.double(), k.double(), wide, layout, blocks)
    torch.testing.assert_close(got.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("padding", "valid"), [("real", None), ("real", (45, 18)), ("zero", (45, 18)), ("repeat", None)]
)
def test_the_largest_sampled_logits_are_the_same_as_in_torch(plain, padding, valid):
    q, k, blocks, layout = inputs(UNEQUAL, valid)

    def largest(q, k):
        generator = torch.Generator().manual_seed(3)
        return sampled_scores(q, k, blocks, blocks, layout, (3, 5), generator, padding)

    got = largest(q, k)
    plain()
    torch.testing.assert_close(got, largest(q, k), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("rows", "valid"), [(None, None), (4, (45, 18))])
def test_profiles_of_probed_blocks_are_the_same_as_in_torch(plain, rows, valid):
    q, k, blocks, layout = inputs(UNEQUAL, valid)
    got = probe_profiles(q, k, blocks, blocks, layout, 3, rows)
    plain()
    torch.testing.assert_close(got, probe_profiles(q, k, blocks, blocks, layout, 3, rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lengths", "valid"), CASES[1:])
@pytest.mark.parametrize("stride", [1, 5])
def test_largest_weights_are_the_same_as_in_torch(plain, lengths, valid, stride):
    q, k, blocks, layout = inputs(lengths, valid)
    got = largest_weights(q, k, blocks, blocks, layout, stride)
    plain()
    torch.testing.assert_close(got, largest_weights(q, k, blocks, blocks, layout, stride), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("lengths", "valid"), CASES[1:])
@pytest.mark.parametrize("is_stale", [False, True])
def test_the_exact_mass_is_the_same_as_in_torch(plain, lengths, valid, is_stale):
    """Weighted by a log-sum-exp of its own or of an earlier step, which may lie far below."""
    q, k, blocks, layout = inputs(lengths, valid)
    wide = Blocking.from_lengths([19, 26])
    lse = None
    if is_stale:
        lse = torch.full((2, 2, 45), 3.0) - 100 * (torch.arange(45) % 7 == 0)
    got, own = block_mass(q, k, wide, blocks, layout, lse)
    plain()
    wanted, norm = block_mass(q, k, wide, blocks, layout, lse)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    for item, real in enumerate(valid or (45, 45)):
        torch.testing.assert_close(own[item, :, :real], norm[item, :, :real], atol=1e-5, rtol=1e-5)


def test_heads_are_taken_a_few_at_a_time(monkeypatch):
    q, k, blocks, layout = inputs(UNEQUAL, None)
    whole = antidiagonal_scores(q, k, blocks, blocks, layout, 4)
    monkeypatch.setattr(block_scores, "_NUMBERS", 1)
    assert torch.equal(antidiagonal_scores(q, k, blocks, blocks, layout, 4), whole)


def test_blocks_of_many_slots_and_other_padding_are_left_to_torch(monkeypatch):
    q, k, blocks, layout = inputs([70, 3], None)
    monkeypatch.setattr("dit_accel.selection.scores.score_blocks", None)
    assert max_slots(torch.float32) == 64
    assert antidiagonal_scores(q, k, blocks, blocks, layout, 1).shape == (2, 2, 2, 2)
    assert antidiagonal_scores(q, k, blocks, blocks, layout, 16, "repeat").shape == (2, 2, 2, 2)


def test_large_logits_and_slots_that_weigh_nothing():
    """Exponentials that overflow where no maximum is taken first, and a query that no sum counts."""
    q, k, _ = (x.float() for x in tensors(batch=1, heads=1, queries=8, dim=16, factor=100.0))
    at = torch.arange(8, dtype=torch.int32).view(1, 1, 2, 4)
    count, weight = torch.ones_like(at), torch.ones(1, 1, 2, 4)
    weight[..., 1, 1:] = 0
    logits = q.double() @ k.double().transpose(-1, -2) / 4
    got = score_blocks(Slots(q, at, count, weight), Slots(k, at, count, torch.ones_like(weight)))
    apart = logits.unflatten(-1, (2, 4)).logsumexp(-1)
    wanted = torch.stack([apart[:, :, :4].logsumexp(2), apart[:, :, 4]], 2)
    torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=1e-5)
    got = score_blocks(Slots(q, at, count, weight), Slots(k, at, count, weight), relative=True)
    shares = (logits + weight.log().view(1, 1, 1, 8)).softmax(-1).unflatten(-1, (2, 4)).sum(-1)
    wanted = torch.stack([shares[:, :, :4].sum(2), shares[:, :, 4]], 2)
    tiny = torch.finfo(torch.float32).tiny
    torch.testing.assert_close(got.double(), wanted.clamp(min=tiny).log(), atol=1e-3, rtol=1e-4)
