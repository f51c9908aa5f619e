"""The rectified remainder (arXiv 2511.19835): its map, its gate and its weights."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.remainders.rectified import isolated_scores, trusted


def test_constant_values_come_out_unchanged():
    for layout in (TokenLayout((3, 5, 7)), TokenLayout((3, 5, 7), 9, "after", valid=(110,))):
        q, k, v = tensors(layout)
        out = attend(get_method("rectified", block=16), layout, q, k, torch.full_like(v, 3.0))
        torch.testing.assert_close(out[:, :, :105], torch.full_like(out[:, :, :105], 3.0))


@pytest.mark.parametrize("gate", [True, False])
def test_output_is_the_published_formula(gate):
    layout = TokenLayout((2, 4, 8), 6, "after")
    q, k, v = tensors(layout)
    method = get_method("rectified", block=8, order="raster", density=0.2, gate=gate)
    blocks = layout.blocks(8)
    plan = method.plan(layout, q, k, v)[1]
    exact = masked(layout, q, k, v, plan.to_token_mask())
    parts = [slice(int(a), int(b)) for a, b in zip(blocks.starts[:-1], blocks.starts[1:], strict=True)]
    out = attend(method, layout, q, k, v)
    for i, rows in enumerate(parts[:-1]):
        mean_q, video = q[0, :, rows].mean(1), parts[:-1]
        u = (q[0, :, rows] - mean_q.unsqueeze(1)).abs().mean(1)
        logits = [(mean_q * k[0, :, p].mean(1)).sum(-1) / 4 + torch.tensor(8.0).log() for p in video]
        words = torch.einsum("hd,hkd->hk", mean_q, k[0, :, 64:]) / 4
        share = torch.cat([torch.stack(logits, -1), words], -1).softmax(-1)
        mass, added = torch.ones(2), torch.zeros(2, 16)
        for j, p in enumerate(video):
            mean_k = k[0, :, p].mean(1)
            w = (k[0, :, p] - mean_k.unsqueeze(1)).abs().mean(1)
            wide = ((u * mean_k).sum(-1).abs() + (mean_q * w).sum(-1).abs()) >= (mean_q * mean_k).sum(-1).abs()
            free = ~plan.to_mask()[0, :, i, j] & ~(wide & gate)
            mass -= share[:, j] * free
            added += (share[:, j] * free).unsqueeze(-1) * v[0, :, p].mean(1)
        torch.testing.assert_close(out[0, :, rows], mass[:, None, None] * exact[0, :, rows] + added.unsqueeze(1))


def test_blocks_of_equal_tokens_are_exact_without_the_gate():
    layout = TokenLayout((2, 4, 8))
    q, k, v = tensors(layout)
    q, k = (x[:, :, ::8].repeat_interleave(8, dim=2) for x in (q, k))
    out = attend(get_method("rectified", block=8, order="raster", gate=False), layout, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_words_like_a_block_of_the_video_have_their_share_of_it():
    layout = TokenLayout((2, 4, 8), 8, "after")
    q, k, _ = tensors(layout)
    k[:, :, 64:] = k[:, :, :8].mean(2, keepdim=True)
    scores = isolated_scores(q, k, layout.blocks(8), layout)
    torch.testing.assert_close(scores[..., 8], scores[..., 0])


def test_the_gate_does_not_depend_on_the_scale_and_closes_where_means_vanish():
    layout = TokenLayout((2, 4, 8))
    q, k, v = tensors(layout)
    blocks = layout.blocks(8)
    near = q + 3
    open_ = trusted(near, k + 3, blocks, layout)
    assert open_.all()
    assert torch.equal(open_, trusted(7 * near, 0.1 * (k + 3), blocks, layout))
    q[:, :, ::2] = -q[:, :, 1::2]
    assert not trusted(q, k, blocks, layout).any()
    method = get_method("rectified", block=8, order="raster")
    plan = method.plan(layout, q, k, v)[1]
    torch.testing.assert_close(attend(method, layout, q, k, v), masked(layout, q, k, v, plan.to_token_mask()))


def test_at_least_a_share_of_blocks_and_the_neighbours_are_kept():
    layout = TokenLayout((4, 8, 8))
    q, k, v = tensors(layout)
    method = get_method("rectified", block=8, density=0.25, mass=0.3)
    mask = method.plan(layout, q, k, v)[1].to_mask()
    assert mask.sum(-1).min() >= 8
    assert mask.diagonal(dim1=-2, dim2=-1).all()
