"""Scores, budgets, forced blocks and the choice: each against its definition in a few plain lines."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.errors import ConfigError
from dit_accel.kernels.ranking import LongRanking, SortedRanking
from dit_accel.layout import TokenLayout
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.plan import Blocking
from dit_accel.selection import (
    Threshold,
    TopK,
    TopP,
    adapt_heads,
    block_means,
    gather_blocks,
    head_classes,
    own_blocks,
    pooled_scores,
    routing_noise,
    select_blocks,
    select_plan,
    self_similarity,
    shares_of,
    sink_blocks,
    smooth_keys,
)

INF = float("inf")


def scores_of(batch=2, heads=3, rows=5, columns=8, seed=0):
    return torch.randn(batch, heads, rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 40))
def test_gathered_blocks_are_the_tokens_of_the_blocks(tokens, size, valid):
    blocks, valid = Blocking.uniform(tokens, size), min(valid, tokens)
    x = torch.arange(1.0, tokens + 1).view(1, 1, tokens, 1).repeat(2, 1, 1, 1)
    x[1, :, valid:] = torch.nan
    rows, real = gather_blocks(x, blocks, (tokens, valid))
    assert rows[0, 0][real[0]].flatten().tolist() == x[0].flatten().tolist()
    assert rows[1, 0][real[1]].flatten().tolist() == list(range(1, valid + 1))
    assert rows[~real.unsqueeze(1)].abs().sum() == 0


@pytest.mark.parametrize("valid", [None, (30,), (57, 41)])
@pytest.mark.parametrize("tiled", [False, True])
def test_gathered_blocks_of_any_partition_leave_their_tokens_as_they_are(valid, tiled):
    layout = TokenLayout((3, 4, 4), 9, "after", valid)
    blocks = tile_blocks(layout, (2, 3, 3)) if tiled else layout.blocks(8)
    x = torch.randn(2, 2, 57, 3, generator=torch.Generator().manual_seed(0))
    for item, length in enumerate(valid * (3 - len(valid)) if valid else ()):
        x[item, :, length:] = torch.nan
    given = x.clone()
    rows, real = gather_blocks(x, blocks, valid)
    means, counts = block_means(x, blocks, valid)
    smooth = smooth_keys(x, valid)
    torch.testing.assert_close(x, given, equal_nan=True, rtol=0, atol=0)
    for item in range(2):
        length = 57 if valid is None else valid[min(item, len(valid) - 1)]
        for block, (start, end) in enumerate(pairwise(blocks.starts.tolist())):
            inside = x[item, :, start : min(end, length)]
            number = max(0, min(end, length) - start)
            assert real[min(item, len(real) - 1), block].sum() == counts[min(item, len(counts) - 1), 0, block] == number
            assert torch.equal(rows[item, :, block, :number], inside)
            assert not rows[item, :, block, number:].any()
            torch.testing.assert_close(means[item, :, block], inside.sum(1) / max(1, number))
        expected = x[item, :, :length] - x[item, :, :length].mean(1, keepdim=True)
        torch.testing.assert_close(smooth[item, :, :length], expected)
        assert not smooth[item, :, length:].any()


def test_top_k_keeps_the_best_and_ties_go_to_the_lower_index():
    scores = torch.tensor([[[[1.0, 3.0, 3.0, 3.0, 0.0]]]])
    assert select_blocks(scores, TopK(count=2)).tolist() == [[[[False, True, True, False, False]]]]
    mask = select_blocks(scores_of(), TopK(share=0.4))
    assert (mask.sum(-1) == 3).all()
    worst_kept = scores_of().masked_fill(~mask, INF).amin(-1)
    assert (worst_kept > scores_of().masked_fill(mask, -INF).amax(-1)).all()


@pytest.mark.parametrize(("rounding", "expected"), [("floor", 2), ("round", 3), ("ceil", 3), ("plus_one", 3)])
def test_rounding_of_a_share(rounding, expected):
    assert (select_blocks(scores_of(columns=10), TopK(share=0.25, rounding=rounding)).sum(-1) == expected).all()
    # 0.3 * 10 is a little more than 3 in floating point; it still is 3.
    exact = select_blocks(scores_of(columns=10), TopK(share=0.3, rounding=rounding)).sum(-1)
    assert (exact == (4 if rounding == "plus_one" else 3)).all()


@settings(max_examples=30, deadline=None)
@given(st.floats(0.05, 0.99), st.integers(0, 1000))
def test_top_p_is_minimal_with_the_crossing_block_and_below_without(mass, seed):
    scores = scores_of(seed=seed)
    shares = scores.softmax(-1)
    kept = select_blocks(scores, TopP(mass=mass))
    total = (shares * kept).sum(-1)
    assert (total >= mass - 1e-6).all()
    weakest = shares.masked_fill(~kept, INF).amin(-1)
    assert (total - weakest < mass + 1e-6).all()
    dropped = select_blocks(scores, TopP(mass=mass, crossing="drop"))
    several = dropped.sum(-1) > 1
    assert ((shares * dropped).sum(-1)[several] <= mass + 1e-6).all()
    assert (dropped <= kept).all()
    assert (kept.sum(-1) - dropped.sum(-1) <= 1).all()


def test_top_p_of_everything_keeps_everything_and_limits_bind():
    scores = scores_of() * 30
    assert select_blocks(scores, TopP(mass=1.0)).all()
    assert (select_blocks(scores, TopP(mass=0.01, least=0.5)).sum(-1) == 4).all()
    assert (select_blocks(scores, TopP(mass=1.0, most=0.3)).sum(-1) == 2).all()


def test_threshold_is_mean_plus_tau_sigma_over_real_blocks():
    scores = scores_of()
    scores[..., -2:] = -INF
    mask = select_blocks(scores, Threshold(tau=0.5))
    real = scores[..., :-2]
    limit = real.mean(-1, keepdim=True) + 0.5 * real.std(-1, keepdim=True, correction=0)
    assert torch.equal(mask, torch.nn.functional.pad(real > limit, (0, 2)))
    assert (select_blocks(torch.zeros(1, 1, 2, 4), Threshold(tau=1.0)).sum(-1) == 1).all()


def test_forced_blocks_count_inside_the_budget_or_beside_it():
    scores, forced = scores_of(), torch.zeros(5, 8, dtype=torch.bool)
    forced[:, 3] = True
    inside = select_blocks(scores, TopK(count=3), forced)
    assert inside[..., 3].all()
    assert (inside.sum(-1) == 3).all()
    beside = select_blocks(scores, TopK(count=3), beside=forced)
    assert torch.equal(beside, select_blocks(scores.masked_fill(forced, -INF), TopK(count=3)) | forced)
    more = torch.ones(5, 8, dtype=torch.bool)
    assert select_blocks(scores, TopK(count=1), more).all()
    mass = scores.softmax(-1)
    kept = select_blocks(scores, TopP(mass=0.6), forced)
    assert ((mass * kept).sum(-1) >= 0.6 - 1e-6).all()
    assert kept[..., 3].all()


def test_head_scope_ranks_all_rows_together_and_leaves_none_empty():
    scores = scores_of()
    scores[:, :, 0] -= 50
    mask = select_blocks(scores, TopK(share=0.3, scope="head", rounding="floor"))
    assert (mask.sum((-1, -2)) == 12).all()
    assert (mask[:, :, 0].sum(-1) == 1).all()
    rest = scores[:, :, 1:].flatten(2)
    best = torch.zeros_like(rest, dtype=torch.bool)
    rowwise = torch.zeros_like(scores[:, :, 1:], dtype=torch.bool).scatter_(
        -1, scores[:, :, 1:].argmax(-1, keepdim=True), True
    )
    best.scatter_(-1, rest.masked_fill(rowwise.flatten(2), INF).topk(11).indices, True)
    assert torch.equal(mask[:, :, 1:].flatten(2), best)


def test_layer_scope_ranks_all_rows_of_all_heads_and_leaves_none_empty():
    scores = scores_of()
    scores[:, 0] -= 20
    heads, rows, columns = scores.shape[1:]
    mask = select_blocks(scores, TopK(share=0.5, scope="layer", rounding="floor"))
    assert (mask.sum((1, 2, 3)) == heads * rows * columns // 2).all()
    assert (mask[:, 0].sum(-1) == 1).all()  # the best of each row, and nothing more
    others = scores[:, 1:].flatten(1)
    kept = mask[:, 1:].flatten(1)
    assert (others.masked_fill(~kept, INF).amin(-1) >= others.masked_fill(kept, -INF).amax(-1)).all()
    shares = scores.softmax(-1)
    mass = select_blocks(shares.log(), TopP(mass=0.4, scope="layer"))
    assert ((shares * mass).sum((1, 2, 3)) >= 0.4 * heads * rows - 1e-4).all()


def test_budget_per_head():
    mask = select_blocks(scores_of(), TopK(share=torch.tensor([0.25, 0.5, 1.0])))
    assert mask.sum(-1).unique_consecutive(dim=-1)[0, :, 0].tolist() == [2, 4, 8]
    wide = select_blocks(scores_of(), TopP(mass=torch.tensor([0.3, 0.3, 1.0])))
    assert torch.equal(wide[:, :2], select_blocks(scores_of(), TopP(mass=0.3))[:, :2])
    assert wide[:, 2].all()
    with pytest.raises(ConfigError, match="one value per head"):
        select_blocks(scores_of(), TopK(share=torch.ones(4)))


def test_shares_sum_to_one_in_every_normalisation():
    scores = scores_of().exp()
    scores[..., 0] = -INF
    for normalisation in ("softmax", "min_max"):
        shares = shares_of(scores, normalisation)
        torch.testing.assert_close(shares.sum(-1), torch.ones(2, 3, 5))
        assert (shares[..., 0] == 0).all()
    assert (shares_of(scores, "min_max")[..., 1:].amin(-1) == 0).all()
    assert (shares_of(torch.full((1, 1, 1, 4), -INF)) == 0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9), st.floats(0.05, 1.0))
def test_head_classes_keep_the_mean_and_give_to_the_hard(recall, density):
    classes = head_classes(torch.tensor([recall]), density)
    torch.testing.assert_close(classes.mean(), torch.tensor(density, dtype=torch.float64))
    assert classes.min() > 0
    assert classes.max() <= 1
    easy, hard = int(classes.argmin()), int(classes.argmax())
    if easy != hard:
        assert recall[easy] >= recall[hard]


def test_head_classes_are_the_three_of_the_paper():
    recall = torch.tensor([[0.95, 0.5, 0.81, 0.3, 0.7, 0.6]])
    assert head_classes(recall, 0.2)[0].tolist() == pytest.approx([0.1, 0.3, 0.1, 0.3, 0.2, 0.2])
    easy = torch.tensor([[0.9, 0.95, 0.99]])
    assert head_classes(easy, 0.2)[0].tolist() == pytest.approx([0.3, 0.2, 0.1])


def test_adapted_heads_spend_where_the_mass_is_spread():
    scores = scores_of(batch=1, heads=4, rows=6, columns=20)
    scores[:, 0] *= 20
    densities = adapt_heads(scores, 0.2)
    assert densities[0].argmin() == 0
    assert densities.mean() == pytest.approx(0.2)


def test_own_blocks_share_tokens_with_blocks_of_another_size():
    rows, columns = Blocking.uniform(70, 16), Blocking.uniform(70, 9)
    expected = torch.zeros(rows.count, columns.count, dtype=torch.bool)
    expected[rows.block_of_token(), columns.block_of_token()] = True
    assert torch.equal(own_blocks(rows, columns), expected)
    near = own_blocks(rows, rows, reach=1)
    assert torch.equal(near, (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1)


@pytest.mark.parametrize("position", ["none", "before", "after"])
def test_sink_blocks_hold_the_first_frames_in_any_order(position):
    layout = TokenLayout((5, 3, 4), 0 if position == "none" else 7, position)
    order, blocks = tile_order(layout, (2, 2, 2)), tile_blocks(layout, (2, 2, 2))
    sink = sink_blocks(layout, blocks, 2, order)
    owner = blocks.block_of_token()
    early = {t + layout.video_start for t in range(2 * layout.frame_tokens)}
    expected = [any(int(t) in early for t in order.query[owner == b]) for b in range(blocks.count)]
    assert sink.tolist() == expected
    assert not sink_blocks(layout, blocks, 0, order).any()
    prefixed = TokenLayout((5, 3, 4), layout.text, position, prefix_frames=2)
    assert torch.equal(sink_blocks(prefixed, blocks, 0, order), sink)


@pytest.mark.parametrize("position", ["before", "after"])
def test_text_is_whole_in_both_directions_and_padding_is_never_attended(position):
    valid = None if position == "before" else (50, 57)
    layout = TokenLayout((3, 4, 4), 9, position, valid)
    q, k = torch.randn(2, 2, 2, layout.tokens, 8, generator=torch.Generator().manual_seed(1)).unbind(0)
    rows, columns = layout.blocks(8), layout.blocks(4)
    plan = select_plan(pooled_scores(q, k, rows, layout, columns), TopK(count=5), rows, columns, layout).validate()
    mask, text = plan.to_mask(), layout.text_blocks(columns)
    starts = columns.starts[:-1]
    for item, length in enumerate(valid or (57, 57)):
        real = starts < length
        assert mask[item][..., text & real].all()
        alive = rows.starts[:-1] < length
        assert not mask[item][:, alive][..., ~real].any()
        assert mask[item][:, layout.text_blocks(rows) & alive][..., real].all()


def test_smoothing_does_not_change_selection_and_similarity_is_a_mean_cosine():
    layout = TokenLayout((2, 4, 5), 6, "after", (44,))
    q, k = torch.randn(2, 1, 2, 46, 8, generator=torch.Generator().manual_seed(2)).unbind(0)
    k[:, :, 44:] = torch.nan
    smooth = smooth_keys(k, layout.valid)
    torch.testing.assert_close(smooth[:, :, :44].mean(2), torch.zeros(1, 2, 8), atol=1e-6, rtol=0)
    blocks = layout.blocks(16)
    shift = pooled_scores(q, smooth, blocks, layout) - pooled_scores(q, k.nan_to_num(), blocks, layout)
    torch.testing.assert_close(shift[:, :, :3], shift[:, :, :3, :1].expand(-1, -1, -1, 4))
    measured = self_similarity(k, blocks, layout.valid)
    for j, length in enumerate([16, 16, 8, 4]):
        start = int(blocks.starts[j])
        unit = torch.nn.functional.normalize(k[0, 0, start : start + length], dim=-1)
        torch.testing.assert_close(measured[0, 0, j], (unit @ unit.T).mean())


@given(st.integers(0, 2**31), st.integers(1, 60), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_a_cut_keeps_what_a_stable_sort_keeps(seed, columns, values):
    generator = torch.Generator().manual_seed(seed)
    # Few values, so that many tie, some of them with what must not be chosen.
    scores = torch.randint(-values, values, (2, 3, columns), generator=generator).float()
    scores[torch.rand(scores.shape, generator=generator) < 0.2] = -INF
    first = torch.rand(scores.shape, generator=generator) < 0.1
    counts = torch.randint(0, columns + 1, (2, 3), generator=generator)
    kept = LongRanking(scores, first).leading(counts)
    assert torch.equal(kept, SortedRanking(scores, first).leading(counts))
    assert torch.equal(kept.sum(-1), counts)


def test_noise_is_seeded_shared_by_the_batch_and_scaled():
    scores = scores_of()
    scores[..., -1] = -INF
    noisy = routing_noise(scores, 0.1, seed=3, layer=1, step=2)
    assert torch.equal(noisy, routing_noise(scores, 0.1, seed=3, layer=1, step=2))
    assert torch.equal(noisy[1:], routing_noise(scores[1:], 0.1, seed=3, layer=1, step=2))
    for other in ({"seed": 4}, {"layer": 0}, {"step": 3}):
        assert not torch.equal(noisy, routing_noise(scores, 0.1, **{"seed": 3, "layer": 1, "step": 2, **other}))
    change = ((noisy - scores)[..., :-1] / scores[..., :-1].std(-1, keepdim=True, correction=0)).std()
    assert 0.08 < change < 0.12
    assert torch.isneginf(noisy[..., -1]).all()
    assert routing_noise(scores, 0, 0, 0, 0) is scores


def test_scores_of_half_precision_inputs_are_single_precision():
    layout = TokenLayout((2, 4, 4))
    q, k = torch.randn(2, 1, 2, 32, 8, generator=torch.Generator().manual_seed(0)).bfloat16().unbind(0)
    scores = pooled_scores(q, k, layout.blocks(8), layout)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, pooled_scores(q.float(), k.float(), layout.blocks(8), layout))
