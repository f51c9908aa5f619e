"""Piecewise sparse attention (arXiv 2602.01077) against its definition, one token at a time in float64."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method


def by_definition(q, k, v, selected, block):
    """The hybrid output, from its formula: exact tokens, then a_j V_j, n_j a_j and (g / T) * scale * q·H_sum."""
    out, scale, tokens = torch.empty_like(q), q.shape[-1] ** -0.5, k.shape[0]
    parts = [slice(j, min(j + block, tokens)) for j in range(0, tokens, block)]
    h_sum = sum((k[p] - k[p].mean(0)).T @ v[p] for p in parts)
    for t in range(tokens):
        top, bottom, tail = torch.zeros_like(q[0]), 0.0, 0.0
        for j, p in enumerate(parts):
            if selected[t // block, j]:
                weights = (scale * k[p] @ q[t]).exp()
                top, bottom = top + weights @ v[p], bottom + weights.sum()
            else:
                mass = (scale * k[p].mean(0) @ q[t]).exp()
                top, tail = top + mass * v[p].sum(0), tail + mass * len(k[p])
        out[t] = (top + tail / tokens * scale * q[t] @ h_sum) / (bottom + tail)
    return out


@pytest.mark.parametrize("grid", [(2, 4, 8), (1, 5, 12)])
def test_output_is_the_published_formula(grid):
    layout = TokenLayout(grid)
    q, k, v = (x.double() for x in tensors(layout))
    method = get_method("pisa", density=0.3, block=8)
    plan = method.plan(layout, q, k, v)[1]
    out = attend(method, layout, q, k, v)
    for head in range(2):
        expected = by_definition(q[0, head], k[0, head], v[0, head], plan.to_mask()[0, head], 8)
        torch.testing.assert_close(out[0, head], expected)


@pytest.mark.parametrize(("density", "blocks"), [(0.01, 1), (0.3, 2), (0.49, 3), (1.0, 8)])
def test_every_row_selects_the_floor_of_its_share(density, blocks):
    layout = TokenLayout((1, 8, 8))
    q, k, v = tensors(layout)
    plan = get_method("pisa", density=density, block=8).plan(layout, q, k, v)[1]
    assert (plan.counts == blocks).all()


@pytest.mark.parametrize(
    "parameters", [{}, {"remainder": "pooled"}, {"first_order": "block"}, {"first_order": "mixed"}]
)
def test_full_density_is_dense(parameters):
    layout = TokenLayout((1, 6, 10))
    q, k, v = (x.double() for x in tensors(layout))
    out = attend(get_method("pisa", density=1.0, block=8, **parameters), layout, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-12, rtol=0)


def test_it_is_a_composition_with_a_name():
    layout = TokenLayout((2, 4, 8))
    q, k, v = tensors(layout)
    spelled = get_method(
        "composed",
        order="raster",
        block=8,
        density=0.3,
        rounding="floor",
        keep_self=False,
        remainder="taylor",
        first_order="global",
    )
    torch.testing.assert_close(
        attend(get_method("pisa", density=0.3, block=8), layout, q, k, v), attend(spelled, layout, q, k, v)
    )


def test_the_hybrid_beats_dropping_on_smooth_data():
    layout = TokenLayout((4, 8, 8))
    field = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    q, k, v = (torch.sin(layout.coordinates.float() / 8 @ field) + 0.1 * x for x in tensors(layout))
    dense = F.scaled_dot_product_attention(q, k, v)
    hybrid, dropped = (
        (attend(get_method("pisa", block=16, remainder=rest), layout, q, k, v) - dense).norm()
        for rest in ("taylor", "drop")
    )
    assert hybrid < 0.5 * dropped
