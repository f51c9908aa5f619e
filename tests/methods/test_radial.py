"""Radial attention against its published rule, evaluated token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext


def plan_of(frames: int, size: int, **parameters):
    return get_method("radial", **parameters).select(None, None, CallContext(TokenLayout((frames, 1, size))))


def released_block_mask(frames, size, decay, block, sink):
    """The released rule, written out with s x s token masks in a padded canvas."""
    blocks = frames * size // block
    out = torch.zeros(blocks + 2, blocks + 2, dtype=torch.bool)
    position = torch.arange(size)
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            if (sink and j == 0) or distance <= 1:
                width = float(size)
            else:
                unscaled = 2.0 ** size.bit_length() / 2.0 ** distance.bit_length()
                if unscaled < 128 and distance % int(128 // unscaled) != 0:
                    continue
                width = max(decay * unscaled, block)
            token_mask = (position[:, None] - position[None, :]).abs() <= width
            r, c = i * size % block, j * size % block
            rows, columns = -(-(r + size) // block), -(-(c + size) // block)
            canvas = torch.zeros(rows * block, columns * block)
            canvas[r : r + size, c : c + size] = token_mask
            share = canvas.view(rows, block, columns, block).mean(1)  # [rows, columns, block]: kept rows per column
            kept = (share > 1 / 3).sum(-1) / ((share > 0).sum(-1) + 1e-9) > 0.6
            out[i * size // block :, j * size // block :][:rows, :columns] |= kept
    return out[:blocks, :blocks]


@pytest.mark.parametrize(
    ("frames", "size", "decay", "block", "sink"),
    [(8, 256, 0.5, 64, True), (5, 96, 0.7, 64, False), (6, 80, 0.3, 32, True), (9, 64, 1.0, 16, False)],
)
def test_the_released_variant_is_the_released_rule(frames, size, decay, block, sink):
    ours = plan_of(frames, size, decay=decay, block=block, sink=sink).to_mask()[0, 0]
    inner = frames * size // block  # the ragged tail is kept whole
    theirs = released_block_mask(frames, size, decay, block, sink)
    theirs.fill_diagonal_(True)  # our guard against rows with nothing to attend
    assert torch.equal(ours[:inner, :inner], theirs[:inner, :inner])


@pytest.mark.parametrize(
    ("frames", "size", "decay", "block", "sink", "neighbor", "density"),
    [
        (18, 3840, 1.0, 128, True, 1.0, 0.430919),
        (18, 3840, 0.5, 128, True, 1.0, 0.338903),
        (18, 3840, 0.3, 128, True, 1.0, 0.298656),
        (18, 3840, 0.2, 128, True, 1.0, 0.287133),
        (18, 3840, 0.1, 128, True, 0.5, 0.263368),
        (30, 3840, 0.95, 128, False, 1.0, 0.274632),
        (20, 3840, 0.8, 64, True, 1.0, 0.349111),
        (32, 3600, 0.95, 128, False, 1.0, 0.275289),
    ],
)
def test_published_densities(frames, size, decay, block, sink, neighbor, density):
    plan = plan_of(frames, size, decay=decay, block=block, sink=sink, neighbor=neighbor)
    assert plan.density == pytest.approx(density, abs=5e-7)


@pytest.mark.parametrize(
    ("frames", "size", "decay", "block", "sink", "blocks"),
    [(8, 256, 0.5, 64, True, 748), (8, 512, 0.5, 128, False, 772), (6, 384, 0.2, 128, True, 285)],
)
def test_small_cases(frames, size, decay, block, sink, blocks):
    assert int(plan_of(frames, size, decay=decay, block=block, sink=sink).counts.sum()) == blocks


def test_row_counts_of_the_published_shape():
    counts = plan_of(18, 3840, decay=0.2, block=128).counts
    assert (int(counts.min()), int(counts.max())) == (92, 162)


def test_density_by_frame_distance():
    mask = plan_of(30, 3840, decay=0.95, block=128, sink=False).to_mask()[0, 0]
    per_pair = mask.view(30, 30, 30, 30).permute(0, 2, 1, 3).flatten(2).float().mean(-1)
    by_distance = [per_pair.diagonal(d).mean().item() for d in range(30)]
    expected = [1.0] * 2 + [0.4378] * 2 + [0.22] * 4 + [0.16] * 8 + [0.0978] * 14
    assert by_distance == pytest.approx(expected, abs=5e-5)


def test_frame_skipping():
    method = get_method("radial", sink=False)
    kept = [d for d in range(2, 32) if method.half_width(d, 256, 1.0) >= 0]
    assert kept == [2, 3, 4, 6, 8, 12, 16, 24]


def test_two_frames_are_dense():
    assert plan_of(2, 192).density == 1.0


def test_symmetry_without_sink_on_aligned_frames():
    mask = plan_of(9, 128, decay=0.4, sink=False).to_mask()[0, 0]
    assert torch.equal(mask, mask.T)


def test_own_frame_and_neighbours_are_kept_on_aligned_frames():
    mask = plan_of(7, 128, decay=0.1, block=64, sink=False).to_mask()[0, 0].view(7, 2, 7, 2)
    for i in range(7):
        for j in range(max(0, i - 1), min(7, i + 2)):
            assert mask[i, :, j].all()


def paper_tokens(frames, size):
    """Equation 4 of the paper with the sink, token by token."""
    mask = torch.zeros(frames, size, frames, size, dtype=torch.bool)
    position = torch.arange(size)
    offset = (position[:, None] - position[None, :]).abs()
    for i in range(frames):
        for j in range(frames):
            distance = abs(i - j)
            reach = 2 ** int(math.log2(max(distance, 1)))
            if distance <= 1 or j == 0:
                mask[i, :, j] = True
            elif reach <= size:
                mask[i, :, j] = offset + 1 <= size / reach
            elif distance % math.ceil(reach / size) == 0:
                mask[i, :, j] = offset == 0
    return mask.view(frames * size, frames * size)


def test_the_paper_variant_covers_exactly_the_blocks_its_tokens_touch():
    frames, size, block = 12, 24, 8
    tokens = paper_tokens(frames, size)
    count = frames * size // block
    touched = tokens.view(count, block, count, block).any(3).any(1)
    assert torch.equal(plan_of(frames, size, variant="paper", block=block).to_mask()[0, 0], touched)


def test_the_paper_density_of_the_sheet():
    assert paper_tokens(12, 16).float().mean().item() == pytest.approx(0.635, abs=5e-4)
    plan = plan_of(12, 16, variant="paper", block=1)
    assert plan.density == pytest.approx(0.635, abs=5e-4)


@pytest.mark.parametrize("position", ["before", "after"])
def test_text_attends_and_is_attended_by_all(position):
    layout = TokenLayout((6, 4, 20), text=37, text_position=position)
    plan = get_method("radial", decay=0.1, block=16, sink=False).select(None, None, CallContext(layout))
    text = layout.text_blocks(plan.q_blocks)
    mask = plan.to_mask()[0, 0]
    assert mask[text].all()
    assert mask[:, text].all()
    assert not mask.all()
    assert int(text.sum()) == 3


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 6), st.integers(1, 9)),
    block=st.sampled_from([1, 4, 16, 64]),
    variant=st.sampled_from(["released", "paper", "blocks"]),
    density=st.one_of(st.none(), st.floats(0.01, 1.0)),
    sink=st.booleans(),
)
def test_any_grid_makes_a_valid_plan(grid, block, variant, density, sink):
    layout = TokenLayout(grid)
    method = get_method("radial", variant=variant, block=block, density=density, sink=sink)
    plan = method.select(None, None, CallContext(layout)).validate()
    assert plan.q_blocks.tokens == layout.tokens
    assert plan.to_mask()[0, 0].diagonal().all()
    if density == 1.0:
        assert plan.density == 1.0


def released_block_widths(frames, size, block, widths, least):
    """The rule of LightX2V as it is written there: base squares and bands, frame distance by frame distance."""
    a, count = size / block, -(-frames * size // block)
    width = [max(least, c * a) for c in widths] + [least] * (frames - len(widths))
    mask = torch.zeros(count, count, dtype=torch.bool)
    for i in range(count):
        for j in range(count):
            for t in range(frames):
                for x, y in ((i, j), (j, i)):
                    n = x * block // size
                    inside = (n + t) * size <= y * block <= (n + t + 1) * size
                    mask[i, j] |= inside and abs(y - x - t * a) <= width[t]
    return mask | (torch.arange(count) <= a)


@pytest.mark.parametrize(("frames", "size", "block"), [(4, 96, 32), (5, 50, 16), (3, 20, 64)])
def test_the_blocks_variant_is_the_rule_in_blocks(frames, size, block):
    widths = (1.0, 0.5, 0.25)
    plan = plan_of(frames, size, variant="blocks", block=block, widths=widths, least=2.0)
    assert torch.equal(plan.to_mask()[0, 0], released_block_widths(frames, size, block, widths, 2.0))


@pytest.mark.parametrize(
    ("size", "widths", "least", "density"),
    [
        (3600, (1.0, 0.5, 0.25, 0.25), 2.0, 0.324),
        (3600, (1.0, 0.5, 0.056), 1.0, 0.223),
        (1560, (1.0, 0.5, 0.25, 0.25), 2.0, 0.431),
        (1560, (1.0, 0.5, 0.056), 1.0, 0.292),
    ],
)
def test_densities_of_the_blocks_variant(size, widths, least, density):
    plan = plan_of(21, size, variant="blocks", block=128, widths=widths, least=least)
    assert plan.to_mask().double().mean().item() == pytest.approx(density, abs=6e-4)


def test_the_paper_variant_has_no_floor():
    wide, narrow = (plan_of(18, 768, variant="paper", decay=decay, block=16, sink=False) for decay in (1.0, 0.02))
    released = plan_of(18, 768, decay=1e-9, block=16, sink=False)
    assert narrow.density < 0.6 * released.density < 0.4 < wide.density
    assert plan_of(18, 384, variant="paper", density=0.15, block=16).density == pytest.approx(0.15, abs=0.02)


def test_conditioning_frames_are_a_sink():
    call = CallContext(TokenLayout((9, 4, 16), prefix_frames=2))
    for variant in ("released", "paper", "blocks"):
        for sink in (False, True):
            method = get_method("radial", variant=variant, decay=0.1, block=16, sink=sink)
            assert method.select(None, None, call).to_mask()[0, 0, :, :8].all()


def test_density_lowers_the_decay_as_far_as_the_rule_goes():
    loose, tight = plan_of(18, 384, density=0.6), plan_of(18, 384, density=0.3)
    assert tight.density < loose.density <= 0.6
    assert plan_of(18, 384, density=0.001).density == plan_of(18, 384, decay=1e-9).density
