"""Vertical and slash lines: planted lines are found, and the plan is their union."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.methods.vertical_slash import VerticalSlash, _share, line_scores
from dit_accel.sampling import sample_rows
from dit_accel.state import CallContext

LAYOUTS = [
    TokenLayout((3, 4, 6)),
    TokenLayout((3, 4, 6), 7, "before"),
    TokenLayout((3, 4, 6), 7, "after", valid=(74, 79)),
    TokenLayout((1, 9, 9)),
]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [1, 5, 8])
def test_scores_are_brute_force_sums(layout, block):
    q, k, _ = tensors(layout, batch=2)
    rows = sample_rows(layout, 9, 0)
    columns, diagonals = line_scores(q.double(), k.double(), rows, layout, block)
    logits = q[:, :, rows].double() @ k.double().transpose(-1, -2) / 4
    if layout.valid is not None:
        padded = torch.arange(layout.tokens) >= torch.tensor(layout.valid).view(-1, 1, 1, 1)
        logits = logits.masked_fill(padded, -torch.inf)
    mass = logits.softmax(-1)[..., layout.video_slice()]
    count = -(-layout.video // block)
    expected_columns, sums = torch.zeros_like(columns), torch.zeros(2, 2, 2 * count, dtype=torch.float64)
    pairs = torch.zeros(2 * count)
    for r, i in enumerate((rows - layout.video_start).tolist()):
        for j in range(layout.video):
            expected_columns[..., j // block] += mass[:, :, r, j]
            sums[..., (i - j) // block + count] += mass[:, :, r, j]
            pairs[(i - j) // block + count] += 1
    torch.testing.assert_close(columns, expected_columns)
    torch.testing.assert_close(diagonals, sums / pairs.clamp(min=1))
    if not layout.text:
        assert columns.sum(-1) == pytest.approx(len(rows))
        assert sums.sum(-1) == pytest.approx(len(rows))


def planted(layout, columns, distances):
    """Queries and keys whose attention lies on the given key columns and distances i - j."""
    turns = torch.arange(1, 97) * 2 * torch.pi / 193  # a period longer than all distances

    def code(positions):
        angle = torch.outer(positions, turns)
        return 1.5 * torch.cat([angle.sin(), angle.cos()], -1)

    at = torch.arange(layout.tokens)
    q = torch.cat([sum(code(at - d) for d in distances), torch.full((layout.tokens, 1), 8.0)], -1)
    k = torch.cat([code(at), torch.zeros(layout.tokens, 1)], -1)
    k[columns, -1] = 24.0
    return q[None, None], k[None, None]


def test_planted_lines_are_found():
    layout = TokenLayout((4, 4, 6))
    q, k = planted(layout, [11, 70], [24, -24])
    method = VerticalSlash(vertical=2, slash=3, near=0, block=1, rows=40)
    mask = method.plan(layout, q, k)[1].to_mask()[0, 0]
    i, j = torch.arange(96).unsqueeze(-1), torch.arange(96)
    # With blocks of one token a diagonal bin also touches the one beside it.
    expected = (j == 11) | (j == 70)
    for distance in (-24, 0, 24):
        expected = expected | (i - j == distance) | (i - j == distance + 1)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("lines", [{"vertical": 10**6}, {"slash": 10**6}])
def test_all_lines_are_dense(layout, lines):
    q, k, v = tensors(layout, batch=2)
    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    out = attend(VerticalSlash(block=8, **lines), layout, q, k, v)
    torch.testing.assert_close(out, masked(layout, q, k, v, everything))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_output_is_that_of_the_union(layout):
    q, k, v = (x.double() for x in tensors(layout, batch=2))
    method = VerticalSlash(vertical=9, slash=9, near=3, block=4, rows=20)
    mask = method.plan(layout, q, k)[1].to_token_mask()
    assert 0.1 < mask.float().mean() < 0.9
    assert mask[..., layout.video_slice(), :].diagonal(layout.video_start, dim1=-2, dim2=-1).all()
    expected = masked(layout, q, k, v, mask)
    valid = min(layout.valid or (layout.tokens,))
    for backend in ("torch", "reference"):
        out = attend(method, layout, q, k, v, backend)
        torch.testing.assert_close(out[:, :, :valid], expected[:, :, :valid])


def test_forced_lines_are_kept_at_the_smallest_budget():
    layout = TokenLayout((3, 8, 8), 5, "after")
    q, k, _ = tensors(layout)
    plan = VerticalSlash(vertical=1, slash=1, near=20, sink_frames=1, block=16).plan(layout, q, k)[1]
    mask = plan.to_token_mask()[0, 0]
    i = torch.arange(192)
    assert mask[:192, :192][(i.unsqueeze(-1) - i).abs() <= 20].all()
    assert mask[:, :64].all()
    assert mask[:, 192:].all()
    assert mask[192:].all()


def test_rows_are_a_set_and_never_padding():
    layout = TokenLayout((3, 4, 6), 7, "after", valid=(75,))
    q, k, v = tensors(layout)
    rows = sample_rows(layout, 12, 3, 1)
    assert torch.equal(rows, sample_rows(layout, 12, 3, 1))
    assert not torch.equal(rows, sample_rows(layout, 12, 3, 2))
    assert len(rows.unique()) == 12
    assert int(rows.max()) < 72
    assert sample_rows(TokenLayout((3, 4, 6), 7, "before"), 99, 0).tolist() == list(range(7, 79))
    shuffled = rows[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    for ordered, mixed in zip(*(line_scores(q, k, r, layout, 8) for r in (rows, shuffled)), strict=True):
        torch.testing.assert_close(ordered, mixed)
    method, call = get_method("vertical_slash", block=8, vertical=16, slash=16, near=4), CallContext(layout)
    plan = method.select(q, k, call)
    k[:, :, 75:], q[:, :, 75:] = 99.0, 99.0
    assert torch.equal(method.select(q, k, call).indices, plan.indices)
    v[:, :, 75:] = torch.nan
    assert attend(method, layout, q, k, v)[:, :, :75].isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8, 1.0])
def test_density_scales_both_budgets_as_far_as_the_forced_lines_go(layout, density):
    q, k, _ = tensors(layout, batch=2, heads=3)
    method = VerticalSlash(density=density, vertical=8, slash=16, near=0, block=4, rows=20)
    plan = method.select(q, k, CallContext(layout))
    video = ~layout.text_blocks(plan.k_blocks)
    share = plan.to_mask()[..., video, :][..., video].double().mean((-1, -2))
    real = 1.0 if layout.valid is None else None
    assert (share <= density).all()
    if real is not None:
        assert (share > density - 0.15).all()


def test_the_share_of_columns_and_diagonals_is_counted_without_a_mask():
    generator = torch.Generator().manual_seed(0)
    column = torch.rand(2, 3, 9, generator=generator) < 0.3
    touched = torch.rand(2, 3, 17, generator=generator) < 0.3
    i = torch.arange(9)
    mask = touched[..., i.unsqueeze(-1) - i + 8] | column.unsqueeze(-2)
    torch.testing.assert_close(_share(column, touched)[..., 0], mask.double().mean((-1, -2)))
