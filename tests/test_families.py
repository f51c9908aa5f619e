"""FLUX, CogVideoX and HunyuanVideo: dense through us is stock, sparse at full density is dense."""

from __future__ import annotations

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, FluxTransformer2DModel, HunyuanVideoTransformer3DModel

import dit_accel
from dit_accel.errors import UnsupportedError


def flux():
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    rows, columns = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    ids = torch.stack([torch.zeros(63), rows.flatten(), columns.flatten()], dim=-1)
    values = {
        "hidden_states": torch.randn(2, 63, 8),
        "encoder_hidden_states": torch.randn(2, 13, 12),
        "pooled_projections": torch.randn(2, 12),
        "timestep": torch.tensor([0.7, 0.7]),
        "img_ids": ids,
        "txt_ids": torch.zeros(13, 3),
        "guidance": torch.tensor([3.5, 3.5]),
    }
    return model.eval(), values, (1, 7, 9), 4, 0.7


def cogvideox(rotary=True):
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=8,
        text_embed_dim=12, num_layers=2, sample_width=10, sample_height=6, sample_frames=9, max_text_seq_length=13,
        use_rotary_positional_embeddings=rotary,
    )  # fmt: skip
    values = {
        "hidden_states": torch.randn(2, 3, 4, 6, 10),
        "encoder_hidden_states": torch.randn(2, 13, 12),
        "timestep": torch.tensor([600, 600]),
    }
    if rotary:
        values["image_rotary_emb"] = torch.randn(2, 45, 16).unbind()
    return model.eval(), values, (3, 3, 5), 2, 0.6


def hunyuan():
    torch.manual_seed(0)
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=2,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, guidance_embeds=True, text_embed_dim=12,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, 6:] = 0
    values = {
        "hidden_states": torch.randn(2, 4, 3, 4, 5),
        "encoder_hidden_states": torch.randn(2, 11, 12),
        "encoder_attention_mask": mask,
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([500.0, 500.0]),
        "guidance": torch.tensor([6000.0, 6000.0]),
    }
    return model.eval(), values, (3, 4, 5), 4, 0.5


FAMILIES = [flux, cogvideox, hunyuan]


@torch.no_grad()
def run(model, values):
    return model(**values, return_dict=False)[0]


# Diffusers cannot fuse the projections of HunyuanVideo.
@pytest.mark.parametrize(
    ("make", "fused"), [(flux, False), (flux, True), (cogvideox, False), (cogvideox, True), (hunyuan, False)]
)
def test_dense_equals_stock(make, fused):
    model, values, _, layers, _ = make()
    if fused:
        model.fuse_qkv_projections()
    stock, before = run(model, values), dict(model.attn_processors)
    with dit_accel.accelerate(model, method="dense") as acc:
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=1e-6)
        assert len(acc.report().calls) == layers
    assert all(model.attn_processors[name] is before[name] for name in before)
    assert torch.equal(run(model, values), stock)


def test_dense_equals_stock_without_rotary_embedding():
    model, values, *_ = cogvideox(rotary=False)
    stock = run(model, values)
    with dit_accel.accelerate(model, method="dense"):
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize("method", ["radial", "composed"])
def test_full_density_equals_stock_with_text_and_padding(make, method):
    model, values, _, layers, _ = make()
    stock = run(model, values)
    with dit_accel.accelerate(model, method=method, density=1.0, block=16, break_even=1.0) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert [c.reason for c in acc.report().calls] == [None] * layers


@pytest.mark.parametrize("make", FAMILIES)
def test_grid_and_noise_level_are_read_from_the_arguments(make):
    model, values, grid, _, noise = make()
    with dit_accel.accelerate(model, method="composed", tile=[1, 2, 2], density=0.3, break_even=1.0) as acc:
        run(model, values)
        state = acc.engines["transformer"].state
        assert state.grid == grid
        assert state.noise == pytest.approx(noise)
        assert 0 < acc.report().density < 1


def test_padding_text_has_no_influence_on_the_video():
    model, values, *_ = hunyuan()
    with dit_accel.accelerate(model, method="composed", tile=[1, 2, 2], density=0.4, break_even=1.0):
        before = run(model, values)
        values["encoder_hidden_states"][1, 6:] += 10.0
        torch.testing.assert_close(run(model, values), before)


def test_other_processors_are_refused_by_name():
    model, *_ = flux()

    class SomebodysAttnProcessor:
        pass

    model.transformer_blocks[1].attn.processor = SomebodysAttnProcessor()
    with pytest.raises(UnsupportedError, match=r"transformer_blocks\.1\.attn.*SomebodysAttnProcessor"):
        dit_accel.accelerate(model, method="dense")
