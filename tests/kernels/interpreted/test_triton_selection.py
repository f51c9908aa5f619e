"""Selection and order kernels in the interpreter against plain torch."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import tensors

from dit_accel.kernels import selection
from dit_accel.kernels.selection import Rule, gather_tokens, pooled_means, scatter_tokens, select_blocks
from dit_accel.plan import Blocking

RULES = [Rule("top_k", 1), Rule("top_k", 4), Rule("top_k", 99), Rule("top_p", 0.6), Rule("top_p", 1.0)]
RULES += [Rule("threshold", 0.1)]


def plain(scores, rule, forced, width):
    """The definition, row by row in Python."""
    indices, counts = torch.zeros(*scores.shape[:3], width, dtype=torch.int32), []
    for place in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])):
        b, h, i = place.tolist()
        row, share = scores[b, h, i].tolist(), scores[b, h, i].softmax(0).nan_to_num(0.0).tolist()
        possible = [j for j in range(len(row)) if row[j] != -torch.inf]
        kept = [j for j in possible if forced is not None and forced[i, j]]
        for j in sorted(set(possible) - set(kept), key=lambda j: (-row[j], j)):
            if rule.kind == "top_k" and len(kept) >= rule.value:
                break
            if rule.kind == "top_p" and sum(share[j] for j in kept) >= rule.value - 1e-6:
                break
            if rule.kind == "threshold" and share[j] < rule.value:
                break
            kept.append(j)
        kept = sorted(kept or [min(i, len(row) - 1)])[:width]
        indices[b, h, i, : len(kept)] = torch.tensor(kept, dtype=torch.int32)
        counts.append(len(kept))
    return indices, torch.tensor(counts, dtype=torch.int32).view(scores.shape[:3])


def some_scores(columns):
    scores = torch.randn(1, 2, 3, columns, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 0, ::2] = scores[0, 0, 0, 0]  # ties
    scores[0, 1, 0, 1:] = -torch.inf
    scores[0, 1, 2] = -torch.inf
    scores[0, 1, 1, :2] = torch.tensor([0.0, -0.0])[: min(2, columns)]
    return scores


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("columns", "with_forced"), [(1, False), (33, False), (13, True)])
def test_rows_keep_what_the_rule_says(rule, columns, with_forced):
    scores, forced = some_scores(columns), None
    if with_forced:
        forced = torch.rand(3, columns, generator=torch.Generator().manual_seed(1)) < 0.2
    wanted = plain(scores, rule, forced, columns)
    for got in (select_blocks(scores, rule, forced), selection._select_sorted(scores, rule, forced, columns)):
        torch.testing.assert_close(got, wanted)


def test_a_narrow_result_cuts_long_rows():
    indices, counts = select_blocks(some_scores(13), Rule("top_p", 1.0), width=3)
    assert indices.shape == (1, 2, 3, 3)
    assert counts.max() == 3


@pytest.mark.parametrize("kv_len", [None, (50, 21)])
def test_means_of_queries_and_keys_in_one_launch(monkeypatch, kv_len):
    q, k, _ = (x.float() for x in tensors(batch=2, queries=50, dim=24))
    blocks = Blocking.from_lengths([16, 3, 16, 15])
    if kv_len is not None:
        q[1, :, 21:] = k[1, :, 21:] = torch.nan
        kv_len = torch.tensor(kv_len)
    got = pooled_means(q, k, blocks, kv_len)
    monkeypatch.setattr(selection, "runs_triton", lambda x: False)
    torch.testing.assert_close(got, pooled_means(q, k, blocks, kv_len))
    assert got[0].isfinite().all()


@pytest.mark.parametrize(("axes", "transposed"), [((), False), ((1, 2), True), ((2, 1), False), ((2, 2), True)])
def test_tokens_move_into_an_order_and_back(axes, transposed):
    x = tensors(batch=2, queries=70, dim=24)[0].float()
    x = x.transpose(1, 2).contiguous().transpose(1, 2) if transposed else x
    index = torch.rand(*axes, 70, generator=torch.Generator().manual_seed(0)).argsort(-1)
    wide = (index if axes else index.view(1, 1, -1)).expand(2, 2, 70).unsqueeze(-1).expand_as(x)
    moved = gather_tokens(x, index)
    assert torch.equal(moved, x.gather(2, wide))
    assert torch.equal(scatter_tokens(moved, index), x)
