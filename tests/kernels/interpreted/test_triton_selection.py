"""Selection and order in Triton against plain torch: the same blocks to the last tie, and the seam that chooses."""

from __future__ import annotations

import logging

import pytest
import torch
from kernel_cases import tensors

from dit_accel.errors import PlanError
from dit_accel.kernels import operations, ranking
from dit_accel.kernels.block_statistics import block_spread_in_triton
from dit_accel.kernels.moving import gather_tokens, scatter_in_triton
from dit_accel.kernels.operations import register_operation, uses_triton, why_not
from dit_accel.kernels.ranking import CutRanking, DigitRanking, SortedRanking, rank
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking
from dit_accel.selection import Threshold, TopK, TopP, block_means, select_plan
from dit_accel.selection.covariance import covariance_norms, covariance_squares, error_scores, sample_tokens


@pytest.fixture
def plain(monkeypatch):
    """A way to have everything computed in plain torch."""

    def switch():
        monkeypatch.setattr(operations, "why_not_on", lambda device, dtype: "switched off")

    return switch


def some_scores(columns, rows=3):
    scores = torch.randn(2, 2, rows, columns, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0, ::2] = scores[0, 0, 0, 0]  # ties
    scores[0, 1, 0, 1:] = -torch.inf
    scores[0, 1, 1] = 0.0
    scores[0, 1, 1, ::3] = -0.0
    scores[1, 0, 0] *= 1e30
    return scores


@pytest.mark.parametrize(("columns", "share"), [(1, 0.0), (33, 0.0), (13, 0.2), (13, 1.0)])
def test_the_best_of_a_row_are_those_that_a_sort_puts_first(columns, share):
    scores = some_scores(columns)
    first = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < share
    counts = torch.randint(0, columns + 1, scores.shape[:3], generator=torch.Generator().manual_seed(2))
    kept = CutRanking(scores, first).leading(counts)
    assert torch.equal(kept, SortedRanking(scores, first).leading(counts))
    assert torch.equal(kept.sum(-1), counts)


@pytest.mark.parametrize("crossing", ["keep", "drop"])
@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_share_of_the_mass_is_counted_as_after_a_sort(crossing, share):
    scores = some_scores(29)
    first = torch.rand(scores.shape, generator=torch.Generator().manual_seed(1)) < share
    shares = scores.softmax(-1)
    shares[0, 0, 1] = 1 / 29  # a share that whole numbers of candidates reach exactly
    fast, slow = CutRanking(scores, first), SortedRanking(scores, first)
    for mass in (1e-9, 10 / 29, 0.5, 1.0):
        wanted = torch.tensor(mass, dtype=torch.float64)
        assert torch.equal(fast.reaching(shares, wanted, crossing), slow.reaching(shares, wanted, crossing))
    each = torch.tensor([0.2, 0.9], dtype=torch.float64).view(1, 2, 1, 1)
    assert torch.equal(fast.reaching(shares, each, crossing), slow.reaching(shares, each, crossing))


@pytest.mark.parametrize(
    "budget",
    [
        TopK(share=0.3),
        TopK(count=5),
        TopK(share=torch.tensor([0.1, 0.6])),
        TopK("head", share=0.3),
        TopP(mass=0.7),
        TopP(mass=0.7, crossing="drop", least=0.2),
        Threshold(tau=0.4),
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [0, 20])
def test_plans_are_the_same_bit_for_bit(plain, budget, text):
    layout = TokenLayout((2, 4, 8), text, "after" if text else "none", (64 + text, 64) if text else None)
    blocks = layout.blocks(12)
    scores = torch.randint(-4, 5, (2, 2, blocks.count, blocks.count), generator=torch.Generator().manual_seed(0))
    scores = scores / 4
    if text:
        scores[1, ..., -2:] = -torch.inf
    forced = torch.rand(blocks.count, blocks.count, generator=torch.Generator().manual_seed(1)) < 0.1
    got = select_plan(scores, budget, blocks, blocks, layout, forced).validate()
    plain()
    wanted = select_plan(scores, budget, blocks, blocks, layout, forced)
    assert torch.equal(got.counts, wanted.counts)
    assert torch.equal(got.indices, wanted.indices)


@pytest.mark.parametrize("valid", [None, (50, 21)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_statistics_of_blocks(plain, valid, dtype):
    k, v, _ = (x.to(dtype) for x in tensors(batch=2, queries=50, dim=24))
    if valid is not None:
        k[1, :, 21:] = v[1, :, 21:] = torch.nan
    blocks, layout = Blocking.from_lengths([16, 3, 16, 15]), TokenLayout((1, 1, 50), valid=valid)
    norms = covariance_norms(k, v, blocks, layout)
    means = block_means(k.transpose(1, 2).contiguous().transpose(1, 2), blocks, valid)
    plain()
    for got, wanted in zip(means, block_means(k, blocks, valid), strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
        assert got.dtype == torch.float32
    exact = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(norms, covariance_norms(k, v, blocks, layout), atol=exact, rtol=exact)


@pytest.mark.parametrize(
    ("lengths", "dim", "dtype"), [([16, 16, 9], 24, torch.float32), ([70, 1, 33], 16, torch.float16)]
)
@pytest.mark.parametrize("step", [1, 4])
def test_means_and_variances_come_from_one_pass(lengths, dim, dtype, step):
    """A mean far from zero, where sums of squares would cancel; a block of two tiles; an item that ends in a block."""
    blocks, valid = Blocking.from_lengths(lengths), (sum(lengths), lengths[0] - 5)
    x = (tensors(batch=2, queries=sum(lengths), dim=dim)[0] + 300).to(dtype)
    sampled, _ = sample_tokens(blocks, step)
    lengths_on = torch.tensor(valid, dtype=torch.int32)
    clean = x.double()
    x[1, :, valid[1] :] = torch.nan
    means, variance = block_spread_in_triton(x, blocks, lengths_on, step)
    assert means.dtype == variance.dtype == torch.float32
    for item, real in enumerate(valid):
        for block, (start, length) in enumerate(zip(blocks.starts.tolist(), lengths, strict=False)):
            token = torch.arange(start, max(start, min(start + length, real)))
            some = token[torch.isin(token, sampled)]
            for got, at, moment in ((means, token, torch.mean), (variance, some, torch.var)):
                options = {"correction": 0} if moment is torch.var else {}
                wanted = moment(clean[item][:, at], 1, **options) if len(at) else torch.zeros(x.shape[1], dim)
                torch.testing.assert_close(got[item, :, block].double(), wanted.double(), atol=2e-4, rtol=2e-5)


def squares_of_rows(k, v, lengths, valid):
    """Squared lengths of the rows of Σ (k - k̄) vᵀ, `[B, H, n, D]`, token by token from the definition."""
    squares = torch.zeros(*k.shape[:2], len(lengths), k.shape[-1], dtype=torch.float64)
    for item, real in enumerate(valid):
        start = 0
        for block, length in enumerate(lengths):
            keys, values = (x[item, :, start : max(start, min(start + length, real))] for x in (k, v))
            start += length
            if keys.shape[1]:
                centred = keys - keys.mean(1, keepdim=True)
                rows = sum(centred[:, t, :, None] * values[:, t, None, :] for t in range(keys.shape[1]))
                squares[item, :, block] = rows.square().sum(-1)
    return squares


@pytest.mark.parametrize(
    ("lengths", "dim", "dtype"),
    [
        ([16, 16, 16, 9], 24, torch.float32),  # a ragged tail, a head size that is padded
        ([1, 33, 17, 6], 40, torch.float32),  # unequal blocks, one of a single token
        ([65, 5], 64, torch.float16),  # a block of two tiles
        ([64, 63], 72, torch.float16),  # two programs to a block, the second of them half empty
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_squares_of_covariances_are_those_of_the_definition(lengths, dim, dtype, padded):
    tokens = sum(lengths)
    valid = (tokens, tokens - lengths[-1] - 3) if padded else (tokens, tokens)
    k, v, _ = (x.to(dtype) for x in tensors(batch=2, queries=tokens, dim=dim))
    k = k + 3  # a mean that must be taken off
    wanted = squares_of_rows(k.double(), v.double(), lengths, valid)
    k[1, :, valid[1] :] = v[1, :, valid[1] :] = torch.nan
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    layout = TokenLayout((1, 1, tokens), valid=valid if padded else None)
    assert uses_triton("covariance squares", k)
    got = covariance_squares(k, v, Blocking.from_lengths(lengths), layout)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    torch.testing.assert_close(got.double(), wanted, atol=1e-3, rtol=1e-4 if dtype == torch.float32 else 1e-2)


def test_error_scores_are_the_same_in_triton(plain):
    q, k, v = (x.float() for x in tensors(batch=2, queries=57, dim=24))
    # Of the longest one in two tokens is looked at.
    blocks, layout = Blocking.from_lengths([16, 33, 8]), TokenLayout((1, 1, 57), valid=(57, 40))
    got = error_scores(q, k, v, blocks, layout)
    plain()
    torch.testing.assert_close(got, error_scores(q, k, v, blocks, layout), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("axes", [(), (1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("transposed", [True, False])
def test_an_order_and_its_inverse(axes, transposed):
    x = tensors(batch=2, queries=70, dim=24)[0].float()
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
    index = torch.rand(*axes, 70, generator=torch.Generator().manual_seed(0)).argsort(-1)
    wide = (index if axes else index.view(1, 1, -1)).expand(2, 2, 70).unsqueeze(-1).expand_as(x)
    moved = gather_tokens(x, index)
    assert torch.equal(moved, x.gather(2, wide))
    assert torch.equal(scatter_in_triton(moved, index), x)
    assert torch.equal(TokenOrder(index).restore(moved), x)
    with pytest.raises(PlanError, match="expected a permutation of 70 tokens, got one of 69"):
        gather_tokens(x, index[..., 1:])


def test_a_method_runs_in_triton_from_order_to_output_and_gives_what_torch_gives(plain, monkeypatch):
    """The default method, with everything that it needs on a GPU."""
    used = []
    monkeypatch.setattr(operations, "_LOG", logging.getLogger("unused"))
    real = operations.why_not

    def watched(name, device, dtype):
        used.append(name)
        return real(name, device, dtype)

    monkeypatch.setattr(operations, "why_not", watched)
    layout = TokenLayout((2, 8, 12))
    method = get_method("aurora", density=0.25, block=16, query_block=32, score="covariance")
    q, k, v = (x.float() for x in tensors(heads=2, queries=layout.tokens, dim=16))

    def attend(backend):
        order, plan = method.plan(layout, q, k, v)
        from dit_accel.state import CallContext

        out = method.compute(*order.apply(q, k, v), plan, CallContext(layout), backend=backend)
        return plan, order.restore(out)

    plan, out = attend("triton")
    assert set(used) == {"move", "block means", "covariance squares", "block scores", "rank"}
    plain()
    expected_plan, expected = attend("torch")
    assert torch.equal(plan.to_mask(), expected_plan.to_mask())
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_an_operation_that_is_wrong_is_barred_with_the_reason(monkeypatch, caplog):
    monkeypatch.setattr(operations, "_CHECKS", dict(operations._CHECKS))
    monkeypatch.setattr(operations, "_FAULTS", {})
    x = torch.zeros(1, 1, 4)
    calls = []
    register_operation("rank", lambda device, dtype: calls.append(device) or "it keeps the worst")
    for _ in range(2):
        assert isinstance(rank(x, x.bool()), SortedRanking)
    assert len(calls) == 1
    assert "self-test of 'rank' failed on cpu: it keeps the worst" in why_not("rank", x.device, x.dtype)
    assert "plain torch computes it" in caplog.text

    def crashes(device, dtype):
        raise RuntimeError("no kernel image\nis available")

    register_operation("rank", crashes)
    assert why_not("rank", x.device, x.dtype).endswith("RuntimeError: no kernel image")


def test_self_tests_find_a_wrong_kernel(monkeypatch):
    assert operations.operations(torch.device("cpu"), torch.float32) == dict.fromkeys(
        ("block means", "block scores", "covariance squares", "move", "rank")
    )
    monkeypatch.setattr(CutRanking, "leading", lambda self, counts: self.first)
    assert ranking._check(torch.device("cpu"), torch.float32) == "it keeps others than the best"


@pytest.mark.parametrize("columns", [1, 63, 64, 200])
def test_the_best_of_very_many_are_those_that_a_sort_puts_first(monkeypatch, columns):
    monkeypatch.setattr(ranking, "_CHUNK", 64)
    monkeypatch.setattr(ranking, "_AT_ONCE", 32)
    generator = torch.Generator().manual_seed(columns)
    for scale in (1.5, 1e30):  # many ties, over all chunks; many digits
        scores = (torch.randn(2, 3, columns, generator=generator) * scale).round()
        scores[0, 0, : columns // 2] = -torch.inf
        first = torch.rand(scores.shape, generator=generator) < 0.05
        for counts in ([[0, 1, columns]] * 2, [[columns // 2, columns // 3, 7]] * 2):
            wanted = torch.tensor(counts).clamp(max=columns)
            kept = DigitRanking(scores, first).leading(wanted)
            assert torch.equal(kept, SortedRanking(scores, first).leading(wanted))


def test_the_kind_of_ranking_follows_the_length_and_double_precision_is_sorted():
    assert uses_triton("rank", torch.zeros(1))
    wide = torch.zeros(1, 1, ranking._LONGEST_ROW + 1)
    assert isinstance(rank(wide, wide.bool()), DigitRanking)
    assert type(rank(wide.double(), wide.bool())) is ranking.LongRanking
    assert isinstance(rank(wide[..., :4].double(), wide[..., :4].bool()), SortedRanking)
    assert isinstance(rank(wide[..., :4], wide[..., :4].bool()), CutRanking)
