"""Clusters of tokens, the plan that covers them, and what is carried from step to step."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.clustering import chain_order, drawn_centroids, k_means
from dit_accel.state import CallContext

GRID = TokenLayout((4, 8, 8))
TEXT = TokenLayout((3, 5, 7), 11, "after", (116, 109))


def blobs(tokens=120, clusters=4, dim=6, seed=0):
    """Tokens around far centres, `[1, 2, N, D]`, and the centre of each."""
    generator = torch.Generator().manual_seed(seed)
    centres = 10 * torch.randn(1, 2, clusters, dim, generator=generator)
    owner = torch.randint(clusters, (1, 2, tokens), generator=generator)
    x = centres.gather(2, owner.unsqueeze(-1).expand(-1, -1, -1, dim))
    return x + 0.1 * torch.randn(x.shape, generator=generator), owner


def method(**parameters):
    small = {"query_clusters": 3, "key_clusters": 6, "first_iterations": 8, "block": 16}
    return get_method("svg2", **{**small, **parameters})


@pytest.mark.parametrize("chunk", [1, 2**24])
def test_labels_are_the_nearest_and_centroids_the_means(chunk, monkeypatch):
    monkeypatch.setattr("dit_accel.orders.clustering._ELEMENTS", chunk)
    x, _ = blobs()
    start = drawn_centroids(x, 5, torch.Generator().manual_seed(1))
    found = k_means(x, start, 0)
    assert torch.equal(found.labels, torch.cdist(x, start).argmin(-1))
    assert torch.equal(found.centroids, start)
    moved = k_means(x, start, 3)
    assert moved.sizes.sum(-1).tolist() == [[120, 120]]
    for head in range(2):
        for cluster in range(5):
            member = moved.labels[0, head] == cluster
            assert member.sum() == moved.sizes[0, head, cluster]
            if member.any():
                torch.testing.assert_close(moved.centroids[0, head, cluster], x[0, head][member].mean(0))


def test_the_way_of_other_devices_gives_the_same_means():
    from dit_accel.orders import clustering

    x, owner = blobs()
    expected = clustering._means(x, owner, 4)
    wide = clustering._one_hot_means(x, owner, 4)
    for a, b in zip(expected, wide, strict=True):
        torch.testing.assert_close(a, b)


def test_an_empty_cluster_keeps_its_centroid():
    x, _ = blobs()
    start = torch.cat([x[:, :, :2], torch.full((1, 2, 1, 6), 1e4)], 2)
    found = k_means(x, start, 4)
    assert (found.sizes[..., 2] == 0).all()
    assert (found.centroids[:, :, 2] == 1e4).all()


def test_converged_centroids_stop_at_once_and_keep_their_labels():
    x, _ = blobs()
    start = drawn_centroids(x, 4, torch.Generator().manual_seed(0))
    first = k_means(x, start, 100, tolerance=1e-4)
    assert first.iterations < 100
    again = k_means(x, first.centroids, 100, tolerance=1e-4)
    assert again.iterations == 1
    assert torch.equal(again.labels, first.labels)


def test_clusters_do_not_depend_on_a_shift_and_follow_a_shuffle():
    x, _ = blobs()
    start = drawn_centroids(x, 4, torch.Generator().manual_seed(0))
    found = k_means(x, start, 5)
    shift = torch.randn(1, 2, 1, 6, generator=torch.Generator().manual_seed(1))
    assert torch.equal(k_means(x + shift, start + shift, 5).labels, found.labels)
    shuffle = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    assert torch.equal(k_means(x[:, :, shuffle], start, 5).labels, found.labels[..., shuffle])


def test_a_shuffle_of_tokens_shuffles_the_output():
    q, k, v = cases.tensors(GRID)
    starts = [drawn_centroids(x, 3, torch.Generator().manual_seed(0)) for x in (q, k)]
    shuffle = torch.randperm(GRID.tokens, generator=torch.Generator().manual_seed(1))
    outs = []
    for tensors in ((q, k, v), tuple(x[:, :, shuffle] for x in (q, k, v))):
        call = CallContext(GRID, memory={"queries": starts[0], "keys": starts[1]})
        # Blocks of one token are the clusters themselves, wherever their tokens stood.
        rule = method(query_clusters=3, key_clusters=3, block=1, mass=0.5, iterations=4)
        outs.append(cases.attend(rule, GRID, *tensors, call))
        assert float(call.measures["over_computation"]) == pytest.approx(1)
        assert float(call.measures["cluster_density"]) < 1
    torch.testing.assert_close(outs[1], outs[0][:, :, shuffle])


def test_the_chain_visits_each_centroid_once_and_the_nearest_next():
    centroids = torch.tensor([0.0, 5.0, 1.0, 9.0, 2.5, 3.6]).view(1, 1, 6, 1)
    assert chain_order(centroids).flatten().tolist() == [3, 1, 5, 4, 2, 0]
    many = chain_order(torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(many.sort(-1).values, torch.arange(7).expand(2, 3, -1))


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("rule", [{"mass": 1.0}, {"least": 1.0}])
def test_all_clusters_are_dense_attention(layout, rule):
    q, k, v = cases.tensors(layout)
    out = cases.attend(method(**rule), layout, q, k, v)
    torch.testing.assert_close(out, cases.dense(layout, q, k, v), atol=2e-6, rtol=1e-5)


def test_queries_and_keys_have_their_own_order_and_text_stays():
    q, k, v = cases.tensors(TEXT)
    order = method().order(q, k, v, CallContext(TEXT)).validate()
    assert not torch.equal(order.query, order.key_index)
    text = torch.arange(105, 116)
    assert torch.equal(order.query[..., 105:], text.expand(2, 2, -1))
    assert torch.equal(order.key_index[..., 105:], text.expand(2, 2, -1))


def chosen_pairs(call, layout, mass, least):
    """The published rule for one layer, bool `[B, H, Cq, Ck]`, from what order left; and labels in raster order."""
    queries, keys = call.scratch["sides"]
    count_q, count_k = call.memory["queries"].shape[2], call.memory["keys"].shape[2]
    labels = [torch.empty_like(s.labels).scatter_(-1, s.order, s.labels)[..., : layout.video] for s in (queries, keys)]
    sizes = torch.nn.functional.one_hot(labels[1], count_k).sum(2)
    logits = call.memory["queries"] @ call.memory["keys"].transpose(-1, -2) / 4
    weight = sizes.unsqueeze(-2) * logits.exp()
    share = weight / weight.sum(-1, keepdim=True)
    chosen = torch.zeros_like(share, dtype=torch.bool)
    for index in torch.cartesian_prod(*(torch.arange(n) for n in share.shape[:3])).tolist():
        row = share[tuple(index)]
        order = row.argsort(descending=True)
        reached = row[order].cumsum(0)
        keep = max(1, int((reached - row[order] < mass).sum()), int(least * count_k))
        chosen[tuple(index)][order[:keep]] = True
    assert labels[0].max() < count_q
    return chosen, labels


@pytest.mark.parametrize(("mass", "least"), [(0.5, 0.1), (0.7, 0.5), (0.2, 0.34)])
def test_the_plan_covers_the_chosen_pairs_and_little_more(mass, least):
    q, k, v = cases.tensors(GRID)
    call = CallContext(GRID)
    rule = method(mass=mass, least=least)
    order, plan = rule.plan(GRID, q, k, v, call)
    chosen, labels = chosen_pairs(call, GRID, mass, least)
    pairs = torch.stack(
        [torch.stack([chosen[b, h][labels[0][b, h]][:, labels[1][b, h]] for h in range(2)]) for b in range(2)]
    )
    kept = plan.validate().to_token_mask()
    back = torch.empty_like(kept).scatter_(-1, order.key_index.unsqueeze(2).expand_as(kept), kept)
    covered = torch.empty_like(back).scatter_(2, order.query.unsqueeze(-1).expand_as(back), back)
    assert (pairs <= covered).all()
    density = float(pairs.float().mean())
    assert float(call.measures["cluster_density"]) == pytest.approx(density, abs=1e-6)
    assert float(call.measures["over_computation"]) == pytest.approx(plan.density / density, rel=1e-5)
    # A block is kept only when it holds tokens of a chosen pair.
    blocks = covered.gather(2, order.query.unsqueeze(-1).expand_as(covered))
    sorted_pairs = pairs.gather(2, order.query.unsqueeze(-1).expand_as(pairs))
    sorted_pairs = sorted_pairs.gather(-1, order.key_index.unsqueeze(2).expand_as(pairs))
    need = sorted_pairs.view(2, 2, 16, 16, 16, 16).any(-1).any(3)
    assert torch.equal(plan.to_mask(), need)
    assert blocks.any()


def test_with_a_density_blocks_go_by_the_mass_of_their_clusters():
    q, k, v = cases.tensors(GRID)
    call = CallContext(GRID)
    plan = method(density=0.25).plan(GRID, q, k, v, call)[1]
    assert (plan.counts == 4).all()
    rule = method(density=0.25)
    shares = rule.scores(q, k, call, *rule.blocks(GRID)).softmax(-1)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, 16))
    best = shares.argsort(dim=-1, descending=True, stable=True)[..., :4]
    assert torch.equal(plan.to_mask(), torch.zeros_like(plan.to_mask()).scatter_(-1, best, True))


def test_sorted_clusters_cover_more_mass_than_the_raster():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(8, 16, generator=generator)
    owner = torch.randint(8, (2, 256), generator=generator)
    q, k = (centres[part] + 0.3 * torch.randn(256, 16, generator=generator) for part in owner)
    q, k = (x.expand(1, 2, -1, -1) for x in (q, k))
    rule = method(query_clusters=4, key_clusters=8, density=0.25)
    order, plan = rule.plan(GRID, q, k)
    raster = get_method("subblock", block=16, density=0.25).plan(GRID, q, k)[1]
    found = plan.recall(*order.apply(q, k, k)[:2]).mean()
    assert found > 1.5 * raster.recall(q, k).mean()


def test_centroids_are_carried_over_steps_and_start_anew_for_another_shape():
    q, k, v = cases.tensors(GRID)
    call = CallContext(GRID)
    rule = method(iterations=0)
    first = rule.plan(GRID, q, k, v, call)
    kept = call.memory["keys"]
    again = rule.plan(GRID, q, k, v, call)
    assert torch.equal(call.memory["keys"], kept)
    assert torch.equal(first[0].query, again[0].query)
    other = CallContext(GRID, layer=1)
    rule.plan(GRID, q, k, v, other)
    assert not torch.equal(other.memory["keys"], kept)
    small = TokenLayout((2, 4, 8))
    call.layout = small
    rule.plan(small, q[:, :, :64], k[:, :, :64], v[:, :, :64], call)
    assert call.memory["keys"].shape[2] == 1


def test_the_seed_draws_the_first_centroids():
    q, k, v = cases.tensors(GRID)
    plans = [method(density=0.3, first_iterations=1).plan(GRID, q, k, v, CallContext(GRID, seed=s)) for s in (0, 0, 1)]
    assert torch.equal(plans[0][0].query, plans[1][0].query)
    assert not torch.equal(plans[0][0].query, plans[2][0].query)


def test_padded_video_sorts_last():
    layout = TokenLayout((2, 4, 8), 8, "before", (72, 66))
    q, k, v = cases.tensors(layout)
    for x in (q, k, v):
        x[1, :, 66:] = torch.nan
    order, plan = method(density=0.4).plan(layout, q, k, v)
    assert (order.key_index[1, :, 66:] >= 66).all()
    assert (order.query[1, :, :66] < 66).all()
    assert plan.validate().counts.min() >= 1


def test_the_mass_of_clusters_of_equal_keys_is_that_of_their_tokens():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 1, 3, 16, generator=generator)
    which = torch.arange(3).repeat_interleave(torch.tensor([32, 96, 128]))[torch.randperm(256, generator=generator)]
    q, k = torch.randn(1, 1, 256, 16, generator=generator), values[:, :, which]
    call = CallContext(GRID)
    # A fourth centroid, from which all tokens are far, holds none of them and must hold no mass.
    call.memory["keys"] = torch.cat([values, torch.full_like(values[:, :, :1], 50.0)], 2)
    rule = method(query_clusters=1, key_clusters=4, density=0.25, iterations=0)
    order = rule.order(q, k, k, call)
    scores = rule.scores(*order.apply(q, k, k)[:2], call, *rule.blocks(GRID))
    centre = call.memory["queries"][0, 0, 0]
    weights = (k[0, 0] @ centre / 4).softmax(0)[order.key_index[0, 0]]
    torch.testing.assert_close(scores[0, 0].exp() / 16, weights.view(16, 16).sum(-1).expand(16, -1))


def test_a_vector_added_to_all_keys_changes_no_plan():
    q, k, v = (x.double() for x in cases.tensors(GRID))
    plain, shifted = (method(mass=0.5).plan(GRID, q, x, v, CallContext(GRID)) for x in (k, k + 3))
    assert torch.equal(plain[0].key_index, shifted[0].key_index)
    assert torch.equal(plain[1].to_mask(), shifted[1].to_mask())
    assert plain[1].density < 1
