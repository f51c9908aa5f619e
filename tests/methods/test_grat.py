"""Grouped attention: densities, symmetry and reach of its patterns."""

from __future__ import annotations

import math

import pytest
import torch
from method_cases import plan_of, video_mask

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext

COUNTS = [(1, 32, 32), (1, 4, 4), (1, 8, 8), (8, 6, 10)]


def grid_of(counts, tile):
    return tuple(n * t for n, t in zip(counts, tile, strict=True))


@pytest.mark.parametrize(
    ("counts", "parameters", "density"),
    [
        ((1, 32, 32), {}, 63 / 1024),
        ((1, 4, 4), {}, 7 / 16),
        ((1, 8, 8), {}, 15 / 64),
        ((8, 6, 10), {}, 0.34375),
        ((8, 6, 10), {"cross": "lines"}, 22 / 480),
        ((1, 32, 32), {"pattern": "B"}, 9 / 1024),
        ((1, 4, 4), {"pattern": "B"}, 9 / 16),
        ((1, 8, 8), {"pattern": "B"}, 9 / 64),
        ((8, 6, 10), {"pattern": "B"}, 27 / 480),
    ],
)
def test_densities(counts, parameters, density):
    tile = (1 if counts[0] == 1 else 2, 2, 2)
    assert plan_of("grat", grid_of(counts, tile), tile=tile, **parameters).density == pytest.approx(density)


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("cross", ["planes", "lines"])
def test_x_is_symmetric_and_joins_all_groups_over_one_other(counts, cross):
    mask = plan_of("grat", counts, tile=(1, 1, 1), cross=cross).to_mask()[0, 0]
    assert torch.equal(mask, mask.T)
    if cross == "planes":
        assert (mask.float() @ mask.float() > 0).all()


@pytest.mark.parametrize("parameters", [{}, {"cross": "lines"}, {"pattern": "B"}, {"ring": True}])
def test_all_queries_of_a_group_have_one_set_of_keys(parameters):
    layout, tile = TokenLayout((4, 7, 9)), (2, 3, 4)
    mask = video_mask(get_method("grat", tile=tile, **parameters), layout)
    group = (layout.coordinates // torch.tensor(tile)).unique(dim=0, return_inverse=True)[1]
    for one in group.unique():
        assert (mask[group == one] == mask[group == one][0]).all()


def test_x_on_an_axis_with_one_group_is_dense():
    assert plan_of("grat", (6, 8, 8), tile=(6, 2, 2)).density == 1
    assert plan_of("grat", (1, 8, 8), tile=(1, 8, 2)).density == 1


@pytest.mark.parametrize("reach", [0, 1, 2])
def test_b_is_sliding_tiles_with_an_odd_window(reach):
    grid, tile = (5, 9, 11), (2, 2, 3)
    box = plan_of("grat", grid, tile=tile, pattern="B", reach=reach)
    assert torch.equal(box.to_mask(), plan_of("sliding_tile", grid, tile=tile, window=(2 * reach + 1,) * 3).to_mask())
    counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)]
    assert set(box.counts.flatten().tolist()) == {math.prod(min(n, 2 * reach + 1) for n in counts)}


@pytest.mark.parametrize("grid", [(3, 7, 10), (1, 7, 10)])
@pytest.mark.parametrize("parameters", [{}, {"cross": "lines"}, {"pattern": "B"}])
def test_a_grid_that_does_not_divide_by_the_group(grid, parameters):
    layout, tile = TokenLayout(grid), (2, 3, 4)
    group = layout.coordinates.long() // torch.tensor(tile)
    apart = (group.unsqueeze(1) - group).abs()[..., 0 if grid[0] > 1 else 1 :]
    if parameters.get("pattern") == "B":
        counts = [-(-n // t) for n, t in zip(grid, tile, strict=True)][-apart.shape[-1] :]
        centre = group[:, -apart.shape[-1] :].clamp(min=1).minimum((torch.tensor(counts) - 2).clamp(min=0))
        reach = (group[None, :, -apart.shape[-1] :] - centre.unsqueeze(1)).abs()
        expected = ((reach <= 1) | (torch.tensor(counts) <= 2)).all(-1)
    else:
        needed = apart.shape[-1] - 1 if parameters else 1
        expected = (apart == 0).sum(-1) >= needed
    assert torch.equal(video_mask(get_method("grat", tile=tile, **parameters), layout), expected)


def test_a_ring_adds_the_neighbours():
    with_ring, cross, box = (
        plan_of("grat", (4, 5, 6), tile=(1, 1, 1), cross="lines", **change).to_mask()
        for change in ({"ring": True}, {}, {"pattern": "B"})
    )
    assert torch.equal(with_ring, cross | box)


@pytest.mark.parametrize("grid", [(12, 20, 24), (1, 64, 48)])
@pytest.mark.parametrize("parameters", [{}, {"cross": "lines"}, {"ring": True}, {"pattern": "B", "tile": (2, 4, 4)}])
def test_density_is_kept_as_far_as_the_pattern_goes(grid, parameters):
    layout = TokenLayout(grid)
    found = []
    for density in (0.01, 0.1, 0.25, 0.5):
        method = get_method("grat", density=density, **parameters)
        plan = method.select(None, None, CallContext(layout))
        share = float((plan.counts.double() / plan.k_blocks.count).mean())
        fitted = method._fitted(layout)
        assert share == pytest.approx(fitted.share(layout))
        least = min(option.share(layout) for option in method._options(layout))
        assert share <= density + 1e-9 or share == pytest.approx(least)
        found.append(share)
    assert found == sorted(found)
    assert found[-1] > 0.1
    assert get_method("grat", density=1.0).select(None, None, CallContext(layout)).density == 1
