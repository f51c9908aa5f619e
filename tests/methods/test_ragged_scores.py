"""Scores and gates where blocks are ragged, against definitions that never pad."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.selection.scores import antidiagonal_scores

RAGGED = TokenLayout((1, 4, 9))


def antidiagonal_shares(q, k, size, stride):
    """Group by group over whole groups, blocks of any length: `[B, H, nq, nk]`."""
    groups, blocks = q.shape[2] // stride, -(-q.shape[2] // size)
    logits = torch.empty(*q.shape[:2], groups, groups)
    for a in range(groups):
        for c in range(groups):
            pairs = [(a * stride + stride - 1 - i, c * stride + i) for i in range(stride)]
            products = [(q[:, :, row] * k[:, :, column]).sum(-1) for row, column in pairs]
            logits[:, :, a, c] = sum(products) / stride / q.shape[-1] ** 0.5
    shares, total = logits.softmax(-1), torch.zeros(*q.shape[:2], blocks, blocks)
    for a in range(groups):
        for c in range(groups):
            total[:, :, a * stride // size, c * stride // size] += shares[:, :, a, c]
    return total


def test_antidiagonals_of_a_length_that_blocks_do_not_divide():
    q, k, _ = cases.tensors(RAGGED)
    blocks, expected = RAGGED.blocks(16), antidiagonal_shares(q, k, 16, 4)
    mass = antidiagonal_scores(q, k, blocks, blocks, RAGGED, 4).exp()
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([4.0, 4.0, 1.0]).expand(2, 2, 3))
    padded = TokenLayout(RAGGED.grid, 12, "after", (36, 36))
    q, k = (torch.cat([x, torch.full_like(x[:, :, :12], torch.nan)], 2) for x in (q, k))
    rows = padded.blocks(16)
    mass = antidiagonal_scores(q, k, rows, rows, padded, 4).exp()
    torch.testing.assert_close(mass[:, :, :3, :3], expected, atol=1e-5, rtol=1e-4)
    assert (mass[:, :, 3:] < 1e-30).all()
    assert (mass[..., 3:] == 0).all()


def sparge_mask(q, k, rows, columns, similarity, share):
    """The published rule with every block at its true length, for one head."""
    k = k - k.mean(0)
    q_parts, k_parts = q.split(rows), k.split(columns)
    alike = [[], []]
    for side, parts in zip(alike, (q_parts, k_parts), strict=True):
        for part in parts:
            unit = part / part.norm(dim=-1, keepdim=True)
            side.append(bool((unit @ unit.T).mean() > similarity))
    mask = torch.zeros(len(q_parts), len(k_parts), dtype=torch.bool)
    for i, part in enumerate(q_parts):
        logits = [part.mean(0) @ other.mean(0) / q.shape[-1] ** 0.5 for other in k_parts]
        sizes = torch.tensor([float(len(other)) for other in k_parts])
        mass = (torch.stack(logits).exp() * sizes).masked_fill(~torch.tensor(alike[1]), 0)
        order = mass.argsort(descending=True)
        kept = max(1, int(((mass / mass.sum())[order].cumsum(0) <= share).sum()))
        mask[i, order[:kept]] = True
        mask[i] |= ~torch.tensor(alike[1]) | (not alike[0][i])
    return mask


@pytest.mark.parametrize("shape", [(16, 8), (8, 16)])
def test_sparge_of_a_length_that_blocks_do_not_divide(shape):
    q, k, _ = cases.tensors(RAGGED, batch=1)
    # Tokens of each third are alike but for some keys, so that the gate is open for some blocks and closed for others.
    q, k = (0.3 * x + 2 * x[:, :, ::12].repeat_interleave(12, 2) for x in (q, k))
    k[:, :, 16:24] = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    method = get_method("sparge", block=shape[0], key_block=shape[1], similarity=0.5, mass=0.7, density=None)
    mask = cases.video_mask(method, RAGGED, q, k)
    expected = torch.stack([sparge_mask(q[0, head], k[0, head], *shape, 0.5, 0.7) for head in range(2)])
    assert torch.equal(mask[0], expected)
    assert 0.1 < expected.float().mean() < 0.95


def test_sparge_does_not_see_a_vector_added_to_all_keys():
    q, k, _ = (x.double() for x in cases.tensors(cases.LAYOUTS["text after"]))
    method = get_method("sparge", block=16, key_block=16, similarity=0.1, mass=0.7, density=None)
    plain, shifted = (cases.video_mask(method, cases.LAYOUTS["text after"], q, x) for x in (k, k + 3))
    assert torch.equal(plain, shifted)
    assert 0.1 < plain.float().mean() < 0.95
