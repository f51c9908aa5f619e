"""The composed method: any order, selection and remainder against its definition."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.tiles import tile_blocks, tile_order
from dit_accel.selection import block_means, pooled_scores
from dit_accel.selection.covariance import covariance_scores, error_scores
from dit_accel.state import CallContext

grids = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))


@settings(max_examples=40, deadline=None)
@given(grids, st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)), st.integers(0, 9))
def test_tiles_partition_any_grid(grid, tile, text):
    layout = TokenLayout(grid, text, "before" if text else "none")
    order, blocks = tile_order(layout, tile).validate(), tile_blocks(layout, tile)
    owner = blocks.block_of_token()
    for block in range(blocks.count):
        tokens = order.query[owner == block] - layout.video_start
        if bool(layout.text_blocks(blocks)[block]):
            continue
        at = layout.coordinates[tokens].long() // torch.tensor(tile)
        assert (at == at[0]).all()


ORDERS = ["raster", "tile", "bisect", "morton", "hilbert", "axes", "hot_keys", "lsh", "kmeans"]
RESTS = [
    {"remainder": "drop"},
    {"remainder": "pooled", "second_order": True},
    {"remainder": "taylor", "about": "query", "first_order": "mixed"},
    {"remainder": "taylor", "score": "covariance"},
    {"remainder": "history", "score": "subblock"},
    {"remainder": "rectified", "score": "isolated"},
]


def unfit(order, rest):
    return order in ("hot_keys", "lsh", "kmeans") and rest["remainder"] in ("history", "rectified")


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("position", ["none", "before", "after"])
def test_full_density_is_dense_attention(order, position):
    layout = TokenLayout((3, 5, 7), 0 if position == "none" else 11, position)
    q, k, v = tensors(layout, batch=2)
    for rest in RESTS:
        if unfit(order, rest):
            continue
        method = get_method("composed", order=order, density=1.0, block=16, tile=[2, 2, 4], axes=["hwf", "wfh"], **rest)
        torch.testing.assert_close(attend(method, layout, q, k, v), F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("rest", RESTS, ids=str)
def test_padding_is_nowhere_seen(order, rest):
    if unfit(order, rest):
        pytest.skip("not combined")
    layout = TokenLayout((2, 5, 4), 9, "after", valid=(43,))
    q, k, v = tensors(layout)
    method = get_method("composed", order=order, density=0.3, block=16, tile=[2, 2, 2], clusters=5, **rest)
    out = attend(method, layout, q, k, v)[:, :, :43]
    k[:, :, 43:], v[:, :, 43:], q[:, :, 43:] = 50.0, torch.nan, -50.0
    torch.testing.assert_close(attend(method, layout, q, k, v)[:, :, :43], out)


@pytest.mark.parametrize("order", ["raster", "tile"])
@pytest.mark.parametrize("rest", RESTS[:4], ids=str)
def test_fast_and_reference_agree_at_any_density(order, rest):
    layout = TokenLayout((3, 5, 7), 11, "after", valid=(116, 109))
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", order=order, density=0.3, block=16, tile=[2, 2, 4], **rest)
    fast, exact = (attend(method, layout, q, k, v, backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(fast, exact, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("score", ["pooled", "covariance", "error", "antidiagonal", "subblock"])
def test_query_blocks_may_have_a_size_of_their_own(score):
    layout = TokenLayout((3, 5, 7), 11, "after", valid=(116, 109))
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", order="raster", density=0.4, block=8, query_block=20, score=score, stride=4)
    _, plan = method.plan(layout, q, k, v)
    assert plan.q_blocks.same_as(layout.blocks(20))
    assert plan.k_blocks.same_as(layout.blocks(8))
    fast, exact = (attend(method, layout, q, k, v, backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(fast, exact, atol=2e-6, rtol=1e-5)
    # Blocks of both sizes that hold the same four queries again and again get the same keys.
    q = q[:, :, torch.arange(layout.tokens) % 4]
    small = get_method("composed", **{**method.model_dump(), "query_block": None, "keep_self": False})
    large = get_method("composed", **{**method.model_dump(), "keep_self": False})
    rows = [m.plan(layout, q, k, v)[1].to_mask()[:, :, 0] for m in (small, large)]
    assert torch.equal(*rows)


def test_selection_is_top_k_of_the_pooled_mass():
    layout = TokenLayout((4, 4, 4))
    q, k, _ = tensors(layout)
    plan = get_method("composed", order="raster", block=8, density=0.5).plan(layout, q, k)[1]
    pooled = (x.view(1, 2, 8, 8, 16).mean(3) for x in (q, k))
    scores = torch.einsum("bhqd,bhkd->bhqk", *pooled)
    scores.diagonal(dim1=-2, dim2=-1).fill_(torch.inf)
    expected = torch.zeros(1, 2, 8, 8, dtype=torch.bool).scatter_(-1, scores.topk(4).indices, True)
    assert torch.equal(plan.to_mask(), expected)
    assert plan.density == 0.5


def test_sink_frames_are_attended_by_all():
    layout = TokenLayout((5, 4, 4))
    q, k, _ = tensors(layout)
    method = get_method("composed", density=0.01, tile=[1, 4, 4], sink_frames=2)
    mask = method.plan(layout, q, k)[1].to_mask()
    assert mask[..., :2].all()
    assert mask.sum(-1).max() == 3


def test_batch_rows_and_scale_of_scores():
    layout = TokenLayout((3, 5, 7))
    q, k, v = tensors(layout, batch=2)
    method = get_method("composed", density=0.3, tile=[2, 2, 4])
    both = attend(method, layout, q, k, v)
    torch.testing.assert_close(both[1:], attend(method, layout, q[1:], k[1:], v[1:]))


def test_a_remainder_is_closer_to_dense_than_dropping():
    layout = TokenLayout((4, 8, 8))
    generator = torch.Generator().manual_seed(0)
    smooth = layout.coordinates.float() / 8
    field = torch.randn(1, 2, 3, 16, generator=generator)
    q, k, v = (torch.sin(smooth @ field) + 0.1 * x for x in tensors(layout))
    dense = F.scaled_dot_product_attention(q, k, v)
    errors = {
        name: (attend(get_method("composed", density=0.1, remainder=name), layout, q, k, v) - dense).norm().item()
        for name in ("drop", "pooled", "taylor")
    }
    assert max(errors["pooled"], errors["taylor"]) < errors["drop"] / 3


def test_block_means_divide_by_the_true_count():
    blocks = TokenLayout((1, 1, 7)).blocks(4)
    x = torch.arange(7.0).view(1, 1, 7, 1)
    means, counts = block_means(x, blocks, valid=(6,))
    assert means.flatten().tolist() == [1.5, 4.5]
    assert counts.flatten().tolist() == [4, 2]


def test_parameters_are_called_by_their_public_names():
    with pytest.raises(ConfigError, match=r"method\.composed\.order"):
        get_method("composed", order="spiral")
    with pytest.raises(ConfigError, match="did you mean 'remainder'"):
        get_method("composed", remaindr="drop")
    method = get_method("composed", order="raster")
    assert get_method("composed", **method.model_dump()) == method


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"density": None}, "one of density, mass and tau"),
        ({"tau": 1.0}, "tau decides alone"),
        ({"density": 0.3, "mass": 0.9, "heads": "adaptive"}, "set density alone"),
        ({"scope": "layer", "heads": "adaptive"}, "moves blocks between heads already"),
        ({"about": "query", "second_order": True}, "has an exact one"),
        ({"order": "lsh", "remainder": "history"}, "needs an order that stays"),
        ({"order": "kmeans", "touching": True}, "scatters tokens"),
        ({"order": "axes", "axes": ["fhw", "whf"], "touching": True}, "one order for all heads"),
        ({"order": "tile", "query_block": 128}, "share their blocks"),
        ({"order": "raster", "remainder": "rectified", "query_block": 128}, "share their blocks"),
        ({"axes": ["fhh"]}, "expected 'fhw'"),
    ],
)
def test_what_does_not_go_together_is_refused(parameters, message):
    with pytest.raises(ConfigError, match=message):
        get_method("composed", **parameters)


def test_rules_for_how_many_blocks():
    layout = TokenLayout((4, 4, 4))
    q, k, v = tensors(layout)
    counts = {}
    for name, rule in {
        "mass": {"density": None, "mass": 0.5},
        "both": {"density": 0.75, "mass": 0.5},
        "tau": {"density": None, "tau": 1.0},
        "floor": {"density": 0.3, "rounding": "floor"},
        "adaptive": {"density": 0.5, "heads": "adaptive"},
    }.items():
        plan = get_method("composed", order="raster", block=8, keep_self=False, **rule).plan(layout, q, k, v)[1]
        counts[name] = plan.validate().counts
    shares = pooled_scores(q, k, layout.blocks(8), layout).softmax(-1).sort(-1, descending=True).values.double()
    assert torch.equal(counts["mass"], (shares.cumsum(-1) - shares < 0.5).sum(-1).int())
    assert torch.equal(counts["both"], counts["mass"].clamp(min=6))
    assert (counts["floor"] == 2).all()
    assert 1 <= counts["tau"].min() < counts["tau"].max() < 8
    assert counts["adaptive"].double().mean() == 4


def test_touching_and_neighbouring_blocks_are_kept():
    layout = TokenLayout((4, 6, 6), 5, "before")
    q, k, v = tensors(layout)
    method = get_method("composed", tile=[2, 2, 2], density=0.01, touching=True)
    mask = method.plan(layout, q, k, v)[1].to_mask()[0, 0]
    assert torch.equal(mask, mask.T)
    assert int(mask[1].sum()) == 1 + 8  # a corner tile: text, itself and its seven neighbours
    near = get_method("composed", order="raster", block=16, density=0.01, reach=1).plan(layout, q, k, v)[1].to_mask()
    assert near[0, 0, 3, 2:5].all()
    assert int(near[0, 0, 3].sum()) == 1 + 3


def test_covariance_scores_are_the_norms_of_the_covariances():
    layout = TokenLayout((1, 5, 7), 9, "after", valid=(41,))
    q, k, v = tensors(layout)
    blocks = layout.blocks(8)
    scores = covariance_scores(q, k, v, blocks, layout) - pooled_scores(q, k, blocks, layout)
    for j in range(blocks.count - 1):
        inside = slice(int(blocks.starts[j]), min(int(blocks.starts[j + 1]), 41))
        delta = k[:, :, inside] - k[:, :, inside].mean(2, keepdim=True)
        norm = torch.linalg.matrix_norm(delta.transpose(-1, -2) @ v[:, :, inside])
        torch.testing.assert_close(scores[:, :, 0, j], (norm + 1e-5).log())


@pytest.mark.parametrize(("grid", "size", "stride"), [((1, 5, 7), 8, 1), ((1, 17, 11), 32, 2), ((1, 17, 19), 50, 3)])
def test_error_scores_are_tempered_mass_times_the_spread_of_queries_through_the_covariances(grid, size, stride):
    end = grid[1] * grid[2] + 6
    layout = TokenLayout(grid, 9, "after", valid=(end,))
    q, k, v = (x.double() for x in tensors(layout))
    blocks, scale = layout.blocks(size), q.shape[-1] ** -0.5
    scores = error_scores(q, k, v, blocks, layout)
    shares = pooled_scores(q, k, blocks, layout).log_softmax(-1)
    # Of every `stride` tokens one is looked at, each time the next.
    picked = [min(i + n % stride, size - 1) for n, i in enumerate(range(0, size, stride))]
    parts = [[a + i for i in picked if a + i < min(b, end)] for a, b in pairwise(blocks.starts.tolist())]
    for i, j in ((0, 0), (1, 3), (4, 2)):
        keys = k[:, :, parts[j]]
        h = stride * (keys - keys.mean(2, keepdim=True)).transpose(-1, -2) @ v[:, :, parts[j]]
        rows = (scale * q[:, :, parts[i]]).var(2, unbiased=False).diag_embed()
        spread = (h.transpose(-1, -2) @ rows @ h).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(
            scores[:, :, i, j], 0.85 * shares[:, :, i, j] + 0.5 * spread.log(), rtol=1e-6, atol=1e-6
        )
    assert scores[..., int(blocks.block_of_token()[end]) + 1 :].isneginf().all()


def test_routing_noise_is_seeded_and_changes_the_choice():
    layout = TokenLayout((4, 8, 8))
    q, k, v = tensors(layout)
    method = get_method("composed", order="raster", block=8, density=0.3, noise=1.0)
    masks = [method.plan(layout, q, k, v, CallContext(layout, step=step))[1].to_mask() for step in (3, 3, 4)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_int8_is_asked_of_the_kernel():
    layout = TokenLayout((2, 4, 4))
    q, k, v = tensors(layout)
    method = get_method("composed", precision="int8", density=1.0, tile=[2, 2, 2])
    assert method.precision is not None
    assert method.precision.qk == "int8"
    order, plan = method.plan(layout, q, k, v)
    plain, rounded = (
        order.restore(block_attention(*order.apply(q, k, v), plan, precision=precision))
        for precision in (None, method.precision)
    )
    assert 1e-5 < (plain - rounded).norm() / plain.norm() < 0.05
