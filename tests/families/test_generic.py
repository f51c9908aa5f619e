"""The generic family: what it reads, what it leaves alone, and that it agrees with families that know the model."""

from __future__ import annotations

import pytest
import torch
from captured import captured, processors, run
from diffusers import LTX2VideoTransformer3DModel, MochiTransformer3DModel

import dit_accel
from dit_accel.errors import UnsupportedError
from dit_accel.families.generic import GenericFamily, _valid_lengths
from dit_accel.families.processor import UNKNOWN_MASK
from dit_accel.families.registry import family_of

SPARSE = {"method": "composed", "tile": [1, 2, 2], "density": 0.2, "break_even": 1.0}


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("wan2.1-t2v", GenericFamily()),
        ("wan2.1-i2v", GenericFamily(text="none")),
        ("flux1-dev", GenericFamily(grid=(1, 8, 12), text="before", timestep_scale=1.0)),
        ("flux2-dev", GenericFamily(grid=(1, 8, 12), text="before", timestep_scale=1.0)),
        ("hunyuan-video", GenericFamily(text="after")),
    ],
)
def test_it_does_what_the_model_s_own_family_does(name, family):
    model, values = captured(name)
    with dit_accel.accelerate(model, **SPARSE) as acc:
        own, known = run(model, values), acc.report().calls
        noise = acc.engines["transformer"].state.noise
    with dit_accel.accelerate(model, family=family, **SPARSE) as acc:
        assert torch.equal(run(model, values), own)
        calls = acc.report().calls
        assert [(c.layer, c.density, c.reason) for c in calls] == [(c.layer, c.density, c.reason) for c in known]
        assert acc.engines["transformer"].state.noise == pytest.approx(noise)


@pytest.mark.parametrize(("name", "layers"), [("ltx-video", 2), ("qwen-image", 2), ("z-image", 2)])
def test_only_self_attention_is_taken_over_and_given_back(name, layers):
    model, values = captured(name)
    before, stock = processors(model), run(model, values)
    with dit_accel.accelerate(model, method="composed", density=1.0, break_even=1.0) as acc:
        changed = [key for key, processor in processors(model).items() if processor is not before[key]]
        assert len(changed) == layers
        assert not any("attn2" in key or "refiner" in key for key in changed)
        assert all(isinstance(processors(model)[key], type(before[key])) for key in before)
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert acc.report().dense_reasons == {}
        assert "has no family of its own" in acc.summary()
        assert "not known" in acc.summary()
    assert all(processors(model)[key] is processor for key, processor in before.items())


def test_prompts_of_different_length_behind_the_image_are_lengths():
    model, values = captured("z-image")
    values["cap_feats"] = [values["cap_feats"][0], torch.randn(100, 16)]  # a longer prompt than the first
    stock = run(model, values)
    assert not torch.allclose(stock[0], stock[1], atol=1e-3)
    with dit_accel.accelerate(model, method="composed", density=1.0, break_even=1.0) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert acc.report().dense_reasons == {}


def test_text_at_an_unknown_place_makes_calls_dense_and_says_so():
    model, values = captured("flux1-dev")
    stock = run(model, values)
    with dit_accel.accelerate(model, family=GenericFamily(grid=(1, 8, 12)), **SPARSE) as acc:
        assert torch.equal(run(model, values), stock)
        assert "where text stands is not known" in next(iter(acc.report().dense_reasons))
        assert "where text stands is not known" in acc.summary()


def test_padding_before_the_image_makes_calls_dense_and_says_so():
    model, values = captured("qwen-image")
    values["encoder_hidden_states_mask"] = torch.ones(values["encoder_hidden_states"].shape[:2], dtype=torch.bool)
    with dit_accel.accelerate(model, **SPARSE) as acc:
        run(model, values)
        assert acc.report().dense_reasons == {}
    values["encoder_hidden_states_mask"][:, -3:] = False
    with dit_accel.accelerate(model, **SPARSE) as acc:
        run(model, values)
        assert acc.report().dense_reasons == {UNKNOWN_MASK: 2}


def test_a_grid_that_the_arguments_do_not_say_is_asked_for():
    model, values = captured("flux1-dev")
    with (
        dit_accel.accelerate(model, family=GenericFamily(text="before"), **SPARSE),
        pytest.raises(UnsupportedError, match=r"FluxTransformer2DModel.*GenericFamily\(grid="),
    ):
        run(model, values)


def test_attention_that_does_not_go_through_the_dispatcher_is_refused():
    model = MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, num_layers=2, pooled_projection_dim=16, in_channels=4,
        text_embed_dim=16, time_embed_dim=4,
    )  # fmt: skip
    with pytest.raises(UnsupportedError, match="no family for MochiTransformer3DModel"):
        family_of(model)
    with pytest.raises(UnsupportedError, match=r"transformer_blocks\.0.*MochiAttnProcessor2_0.*another way"):
        dit_accel.accelerate(model, family=GenericFamily(grid=(1, 2, 2)))


@pytest.mark.parametrize(
    ("mask", "lengths", "known"),
    [
        ([[1, 1, 1]], None, True),
        ([[1, 1, 0], [1, 0, 0]], (2, 1), True),
        ([[1, 0, 1]], None, False),
        ([[0, 0, 0]], None, False),
    ],
)
def test_masks_of_leading_keys_are_lengths(mask, lengths, known):
    rows = torch.tensor(mask, dtype=torch.bool)
    found, reason = _valid_lengths(rows[:, None, None], 3)
    assert found == lengths
    assert (reason is None) == known
    assert _valid_lengths(rows[:, None, None].float(), 3)[1] == UNKNOWN_MASK
    assert _valid_lengths(rows[:, None, None].expand(-1, 1, 3, 3), 3)[1] == UNKNOWN_MASK


def ltx2(**changes):
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "cross_attention_dim": 32}
    model = LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, audio_in_channels=4, audio_out_channels=4, num_layers=2, caption_channels=12,
        **sizes, **{f"audio_{key}": value for key, value in sizes.items()}, **changes,
    )  # fmt: skip
    values = {
        "hidden_states": torch.randn(1, 3 * 4 * 5, 8),
        "audio_hidden_states": torch.randn(1, 6, 4),
        "encoder_hidden_states": torch.randn(1, 7, 12),
        "audio_encoder_hidden_states": torch.randn(1, 7, 12),
        "timestep": torch.full((1, 60), 500.0),
        "audio_timestep": torch.full((1,), 500.0),
        "num_frames": 3,
        "height": 4,
        "width": 5,
        "audio_num_frames": 6,
        "return_dict": False,
    }
    return model.eval(), values


@pytest.mark.parametrize("changes", [{}, {"perturbed_attn": True}])
def test_ltx_2_keeps_its_audio_attention(changes):
    """LTX-2, and LTX-2.3, whose processors can leave attention out in some blocks, for a further guidance branch."""
    model, values = ltx2(**changes)
    if changes:
        values |= {"spatio_temporal_guidance_blocks": [1], "perturbation_mask": torch.full((1,), 0.5)}
    with torch.no_grad():
        stock, before = model(**values), processors(model)
        with dit_accel.accelerate(model, method="dense"):
            assert all(torch.equal(a, b) for a, b in zip(model(**values), stock, strict=True))
        with dit_accel.accelerate(model, **SPARSE) as acc:
            video, _ = model(**values)
            changed = [key for key, processor in processors(model).items() if processor is not before[key]]
            assert changed == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
            assert acc.engines["transformer"].state.grid == (3, 4, 5)
            assert acc.report().dense_reasons == {}
    assert (video - stock[0]).abs().max() > 1e-5
