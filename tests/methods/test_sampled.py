"""Methods that look at a part of the tokens: ASA, ProxyAttn, FlexPrefill, SparseD."""

from __future__ import annotations

import math

import dynamic_cases as cases
import pytest
import torch

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.flexprefill import jensen_shannon_distance
from dit_accel.methods.registry import get_method
from dit_accel.selection.samples import largest_weights, probe_blocks, probe_profiles
from dit_accel.shard import HeadShard
from dit_accel.state import CallContext

LAYOUT = TokenLayout((4, 8, 8))
TEXT = cases.LAYOUTS["text after"]


def raster(name, **parameters):
    return get_method(name, **{"order": "raster", "block": 16, **parameters})


def test_asa_keeps_within_its_limits_the_best_blocks():
    q, k, _ = cases.tensors(LAYOUT)
    kept = cases.video_mask(raster("asa", least=0.2, most=0.5), LAYOUT, q, k).sum(-1)
    assert kept.min() >= 3
    assert kept.max() <= 8
    exact = cases.video_mask(raster("asa", least=0.25, most=0.25), LAYOUT, q, k)
    assert (exact.sum(-1) == 4).all()
    assert torch.equal(exact, cases.video_mask(raster("asa", density=0.25), LAYOUT, q, k))
    assert cases.video_mask(raster("asa", mass=1.0, most=1.0), LAYOUT, q, k).all()
    with pytest.raises(ConfigError, match="must not exceed"):
        get_method("asa", least=0.5)


def test_asa_leaves_out_the_crossing_block():
    q, k, _ = cases.tensors(LAYOUT)
    method = raster("asa", samples=16, mass=0.6, least=0.01, most=1.0)
    logits = q @ k.transpose(-1, -2) / 4
    energy = (
        (logits - logits.amax(-1, keepdim=True)).exp().unflatten(-1, (16, 16)).amax(-1).unflatten(2, (16, 16)).amax(3)
    )
    assert (energy.amax(-1) == 1).all()
    mask = cases.video_mask(method, LAYOUT, q, k)
    share = energy / energy.sum(-1, keepdim=True)
    best = share.sort(dim=-1, descending=True).values
    expected = (best.cumsum(-1) < 0.6).sum(-1).clamp(min=1)
    assert torch.equal(mask.sum(-1), expected)


def test_asa_draws_other_places_at_every_layer_and_the_same_at_every_step():
    q, k, _ = cases.tensors(LAYOUT)
    method = raster("asa", density=0.3, samples=2)
    plans = [cases.video_mask(method, LAYOUT, q, k, CallContext(LAYOUT, *at)) for at in ((0, 0), (0, 5), (1, 0))]
    assert torch.equal(plans[0], plans[1])
    assert not torch.equal(plans[0], plans[2])


def test_the_pooled_remainder_of_asa_is_exact_for_equal_keys_of_a_block():
    q, k, v = cases.tensors(LAYOUT)
    k, v = (x.unflatten(2, (-1, 16)).mean(3, keepdim=True).expand(-1, -1, -1, 16, -1).flatten(2, 3) for x in (k, v))
    out = cases.attend(raster("asa", remainder="mean"), LAYOUT, q, k, v)
    torch.testing.assert_close(out, cases.dense(LAYOUT, q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("layout", [LAYOUT, TokenLayout((3, 5, 7)), TokenLayout((3, 5, 7), 8, "before", (113, 98))])
def test_the_overlap_of_asa_counts_kept_keys_twice(layout):
    """Where the keys of each group are equal, that is dense attention in which a kept key weighs twice."""
    q, k, v = cases.tensors(layout)
    method = raster("asa", remainder="overlap", pool=6, least=0.2, most=0.3)
    groups, start = torch.arange(layout.video) // 6 * 6 + layout.video_start, layout.video_start
    k, v = (torch.cat([x[:, :, :start], x[:, :, groups]], 2) for x in (k, v))
    call = CallContext(layout)
    out = cases.attend(method, layout, q, k, v, call)
    kept = method.plan(layout, q, k, v)[1].to_token_mask()
    weight = torch.zeros(kept.shape).masked_fill(kept, math.log(2))
    weight[..., :start] = 0.0  # text is kept, and in no mean
    for item, length in enumerate(layout.valid or ()):
        weight[item, ..., length:] = -torch.inf
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=weight)
    for item, length in enumerate(layout.valid or (layout.tokens,) * 2):
        torch.testing.assert_close(out[item, :, :length], expected[item, :, :length], atol=2e-6, rtol=1e-5)
    assert call.extra_density == pytest.approx(-(-layout.video // 6) / layout.tokens)
    alone = cases.attend(raster("asa", least=0.2, most=0.3), layout, q, k, v)
    assert not torch.allclose(out, alone, atol=1e-3)


def test_probes_are_spread_over_the_video_and_exact():
    blocks = TEXT.blocks(16)
    assert probe_blocks(TEXT, blocks, 3).tolist() == [1, 3, 5]
    assert len(probe_blocks(TEXT, blocks, 99)) == 7
    q, k, _ = cases.tensors(TEXT)
    profiles = probe_profiles(q, k, blocks, blocks, TEXT, 3)
    weights = q @ k.transpose(-1, -2) / 4
    weights[1, :, :, 109:] = -torch.inf
    weights = weights.softmax(-1)
    for place, block in enumerate((1, 3, 5)):
        mean = weights[:, :, 16 * block : 16 * block + 16].mean(2)
        expected = torch.stack([part.sum(-1) for part in mean.split(blocks.lengths.tolist(), -1)], -1)
        torch.testing.assert_close(profiles[:, :, place], expected)


def test_largest_weights_of_single_tokens_are_the_softmax():
    q, k, _ = cases.tensors(TEXT)
    blocks = TEXT.blocks(1)
    weights = q @ k.transpose(-1, -2) / 4
    weights[1, :, :, 109:] = -torch.inf
    weights = weights.softmax(-1)
    weights[1, :, 109:] = 0
    torch.testing.assert_close(largest_weights(q, k, blocks, blocks, TEXT, 1), weights)
    coarse = TEXT.blocks(16)
    found = largest_weights(q, k, coarse, coarse, TEXT, 4)
    queries, keys = (torch.cat([part[::4] for part in torch.arange(116).split(coarse.lengths.tolist())]) for _ in "qk")
    logits = q[:1][:, :, queries] @ k[:1][:, :, keys].transpose(-1, -2) / 4
    torch.testing.assert_close(found[0, :, 2, 3], logits.softmax(-1)[0, :, 8:12, 12:16].amax((-1, -2)))


def test_proxies_share_the_ranking_and_heads_have_their_own_budget():
    q, k, _ = cases.tensors(LAYOUT, heads=4)
    q = q * torch.tensor([6.0, 1.0, 6.0, 1.0]).view(1, 4, 1, 1)
    mask = cases.video_mask(get_method("proxyattn", block=16, groups=2), LAYOUT, q, k)
    widths = mask.sum(-1)
    assert (widths == widths[..., :1]).all()
    for one, other in ((0, 1), (2, 3)):
        assert (widths[:, one] < widths[:, other]).all()
        assert (mask[:, one] <= mask[:, other]).all()
    wider = cases.video_mask(get_method("proxyattn", block=16, groups=2, mass=0.99), LAYOUT, q, k)
    assert (mask <= wider).all()
    assert cases.video_mask(get_method("proxyattn", block=16, mass=1.0), LAYOUT, q, k).all()


def test_as_many_proxies_as_heads_rank_each_head_by_itself():
    q, k, _ = cases.tensors(LAYOUT, heads=4)
    mask = cases.video_mask(get_method("proxyattn", block=16, groups=4, stride=1, density=0.25), LAYOUT, q, k)
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1).unflatten(-1, (16, 16)).amax(-1).unflatten(2, (16, 16)).amax(3)
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, weights.topk(4).indices, True))


@pytest.mark.parametrize("seed", range(3))
def test_the_jensen_shannon_distance(seed):
    p, r = torch.rand(2, 5, 9, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    torch.testing.assert_close(jensen_shannon_distance(p, r), jensen_shannon_distance(r, p))
    assert (jensen_shannon_distance(p, p) < 1e-3).all()
    assert (jensen_shannon_distance(p, r) > 0).all()
    first, second = torch.eye(9)[0], torch.eye(9)[1]
    assert float(jensen_shannon_distance(first, second)) == pytest.approx(math.sqrt(math.log(2)))
    assert jensen_shannon_distance(first, first) == 0


def test_flexprefill_trusts_the_pooled_map_where_blocks_are_uniform():
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 1, 16, generator=generator).expand(-1, -1, 256, -1)
    k = torch.randn(1, 2, 16, 1, 16, generator=generator).expand(-1, -1, -1, 16, -1).flatten(2, 3)
    call = CallContext(LAYOUT)
    plan = get_method("flexprefill", block=16, mass=0.6).plan(LAYOUT, q, k, None, call)[1]
    assert float(call.measures["trusted_heads"]) == 1
    share = (q[:, :, :16] @ k.unflatten(2, (16, 16))[..., 0, :].transpose(-1, -2) / 4).softmax(-1)
    kept = (share * plan.to_mask()).sum(-1).mean(-1)
    assert (kept <= 0.6 + 1e-5).all()
    q, k, _ = cases.tensors(LAYOUT)
    get_method("flexprefill", block=16, tau=0.0).plan(LAYOUT, 4 * q, k, None, call)
    assert float(call.measures["trusted_heads"]) == 0


def test_flexprefill_finds_keys_that_all_attend_and_the_distance_of_a_frame():
    layout = TokenLayout((8, 4, 4))
    token = torch.arange(128)
    q, k = torch.zeros(2, 1, 1, 128, 129).unbind(0)
    q[0, 0, token, token], k[0, 0, token, token] = 300.0, 1.0
    next_frame = torch.roll(k, 16, 2)
    plan = get_method("flexprefill", block=16, mass=0.9, probes=8).plan(layout, q, next_frame)[1]
    row = torch.arange(8)
    assert plan.to_mask()[0, 0, row[:7], row[:7] + 1].all()
    assert plan.recall(q, next_frame).mean() > 0.8
    q[..., 128], k[:, :, 37, 128] = 600.0, 1.0
    stripe = get_method("flexprefill", block=16, mass=0.9).plan(layout, q, k)[1]
    assert stripe.to_mask()[..., 2].all()


def test_flexprefill_with_all_mass_is_dense_and_text_is_whole():
    for trust in (0.0, 1.0):
        q, k, v = cases.tensors(TEXT)
        method = get_method("flexprefill", block=16, mass=1.0, tau=trust)
        torch.testing.assert_close(
            cases.attend(method, TEXT, q, k, v), cases.dense(TEXT, q, k, v), atol=2e-6, rtol=1e-5
        )
        narrow = cases.video_mask(get_method("flexprefill", block=16, mass=0.1, tau=trust), TEXT, q, k)
        assert narrow[0, ..., TEXT.text_blocks(TEXT.blocks(16))].all()


def test_sparsed_keeps_one_block_more_than_the_floor():
    q, k, _ = cases.tensors(LAYOUT)
    mask = cases.video_mask(get_method("sparsed", block=16, density=0.3), LAYOUT, q, k)
    assert (mask.sum(-1) == int(16 * 0.3) + 1).all()
    same = cases.video_mask(get_method("adaspa", block=16, density=5 / 16, heads="uniform"), LAYOUT, q, k)
    assert torch.equal(mask, same)


def test_asa_ranks_by_the_largest_weight_relative_to_that_of_the_query():
    q, k, _ = cases.tensors(LAYOUT)
    logits = q @ k.transpose(-1, -2) / 4
    energy = (logits - logits.amax(-1, keepdim=True)).unflatten(-1, (16, 16)).amax(-1).unflatten(2, (16, 16)).amax(3)
    best = energy.argsort(dim=-1, descending=True, stable=True)[..., :4]
    mask = cases.video_mask(raster("asa", samples=16, least=0.25, most=0.25), LAYOUT, q, k)
    assert torch.equal(mask, torch.zeros_like(mask).scatter_(-1, best, True))


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill_keeps_within_its_limits(tau):
    q, k, _ = cases.tensors(LAYOUT)
    few, least, both = (
        cases.video_mask(get_method("flexprefill", block=16, tau=tau, mass=mass, **limits), LAYOUT, q, k)
        for mass, limits in ((0.05, {}), (0.05, {"least": 0.25}), (0.9, {"least": 0.25, "most": 0.25}))
    )
    assert (few <= least).all()
    # A quarter of 16 columns, which every row keeps, and of 31 distances, of which a row holds some.
    assert (least.all(-2).sum(-1) >= 4).all()
    assert (few.all(-2).sum(-1) < 4).all()
    if tau == 0.0:
        assert torch.equal(least, both)
        diagonals = [bool(both[0, 0].diagonal(d).all()) for d in range(-15, 16)]
        assert sum(diagonals) >= 7
        assert (both.sum(-1) <= 4 + 7).all()
    with pytest.raises(ConfigError, match="must not exceed"):
        get_method("flexprefill", least=0.5, most=0.4)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flexprefill_keeps_more_for_more_mass(tau):
    q, k, _ = cases.tensors(LAYOUT)
    masks = [
        cases.video_mask(get_method("flexprefill", block=16, mass=mass, tau=tau), LAYOUT, q, k)
        for mass in (0.3, 0.6, 0.9)
    ]
    assert (masks[0] <= masks[1]).all()
    assert (masks[1] <= masks[2]).all()
    assert masks[0].sum() < masks[1].sum() < masks[2].sum()


def test_flexprefill_keeps_no_more_of_a_trusted_map_than_asked_and_the_next_would_exceed_it():
    q, k, _ = cases.tensors(LAYOUT)
    kept = cases.video_mask(get_method("flexprefill", block=16, mass=0.6, tau=1.0), LAYOUT, q, k)
    share = (q.unflatten(2, (16, 16)).mean(3) @ k.unflatten(2, (16, 16)).mean(3).transpose(-1, -2) / 4).softmax(-1)
    total = (share * kept).sum((-1, -2))
    assert (total <= 0.6 * 16 + 1e-5).all()
    assert (total + share.masked_fill(kept, 0).amax((-1, -2)) > 0.6 * 16).all()
    assert kept.any(-1).all()


def test_a_proxy_of_heads_that_are_alike_scores_as_each_of_them():
    q, k = (x.repeat_interleave(2, 1) for x in cases.tensors(LAYOUT)[:2])
    group, alone = (cases.video_mask(get_method("proxyattn", block=16, groups=g), LAYOUT, q, k) for g in (2, 4))
    assert torch.equal(group, alone)
    assert not torch.equal(group[:, 0], group[:, 2])


@pytest.mark.parametrize(("heads", "groups", "processes"), [(8, 2, 2), (8, 4, 2), (6, 4, 2), (6, 6, 3)])
def test_a_proxy_stands_for_the_same_heads_whatever_process_holds_them(heads, groups, processes):
    q, k, _ = cases.tensors(LAYOUT, heads=heads)
    method, count = get_method("proxyattn", block=16, groups=groups), heads // processes
    whole = cases.video_mask(method, LAYOUT, q, k)
    for first in range(0, heads, count):
        mine, part = method.of_heads(HeadShard(first, count, heads)), slice(first, first + count)
        assert torch.equal(cases.video_mask(mine, LAYOUT, q[:, part], k[:, part]), whole[:, part])
    assert method.of_heads(HeadShard(0, heads, heads)) is method


def test_a_proxy_for_heads_of_two_processes_is_refused():
    with pytest.raises(ConfigError, match=r"method\.proxyattn\.groups: .* groups of 4 heads: use more of them"):
        get_method("proxyattn", groups=2).of_heads(HeadShard(0, 2, 8))


def test_rows_of_sparsed_keep_as_many_blocks_of_text_and_of_video_as_one_another():
    layout = TokenLayout((4, 8, 8), 40, "after")
    q, k, _ = cases.tensors(layout)
    mask, text = cases.video_mask(get_method("sparsed", block=16), layout, q, k), layout.text_blocks(layout.blocks(16))
    rows = mask[:, :, ~text]
    assert (rows[..., text].sum(-1) == 3).all()
    assert rows[..., ~text].sum(-1).unique().numel() == 1
    assert not rows[..., ~text].all()
