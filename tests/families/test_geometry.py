"""What families read from a forward pass: grids with reference images, conditioning frames, masks, adapters."""

from __future__ import annotations

import pytest
import torch
from captured import captured, run

import dit_accel
from dit_accel.errors import UnsupportedError
from dit_accel.families.base import image_grid
from dit_accel.families.processor import UNKNOWN_MASK

SPARSE = {"method": "composed", "tile": [1, 2, 2], "density": 0.3, "break_even": 1.0}


def ids(*sizes):
    """Position ids of images of (height, width), one after another."""
    images = [
        torch.cartesian_prod(torch.tensor([10.0 * i]), torch.arange(float(h)), torch.arange(float(w)))
        for i, (h, w) in enumerate(sizes)
    ]
    return torch.cat(images)


@pytest.mark.parametrize(
    ("sizes", "grid"),
    [
        ([(4, 6)], (1, 4, 6)),
        ([(4, 6), (4, 6), (4, 6)], (3, 4, 6)),
        ([(4, 6), (7, 6)], (1, 11, 6)),
        ([(4, 6), (3, 4)], (1, 6, 6)),
        ([(4, 6), (3, 3)], (1, 1, 33)),
        ([(4, 6), (5, 6), (2, 3)], (1, 10, 6)),
    ],
)
def test_reference_images_are_frames_rows_or_part_of_one_row(sizes, grid):
    found = ids(*sizes)
    assert image_grid(found, len(found)) == grid
    assert image_grid(found[None], len(found)) == grid


def test_ids_that_are_no_raster_give_one_row():
    assert image_grid(ids((4, 6))[:-1], 23) == (1, 1, 23)
    assert image_grid(ids((4, 6)), 30) == (1, 1, 30)


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
@pytest.mark.parametrize("name", ["flux1-dev", "flux2-dev"])
def test_reference_tokens_take_part(name, shape):
    model, values = captured(name)
    first = values["img_ids"] if values["img_ids"].ndim == 2 else values["img_ids"][0]
    extra = torch.zeros(shape[0] * shape[1], first.shape[1])
    extra[:, :3] = ids(shape) + torch.tensor([1.0, 0, 0])
    values["img_ids"] = torch.cat([first, extra.to(first.dtype)])
    hidden = values["hidden_states"]
    values["hidden_states"] = torch.cat([hidden, torch.randn(1, len(extra), hidden.shape[-1])], dim=1)
    stock = run(model, values)
    with dit_accel.accelerate(model, method="dense"):
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=0)
    with dit_accel.accelerate(model, method="composed", density=1.0, break_even=1.0) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert acc.engines["transformer"].state.grid == ((1, 10, 12) if shape == (4, 6) else (1, 1, 131))


@pytest.mark.parametrize(
    ("name", "frames"),
    [
        ("hunyuan-video-i2v", 1),
        ("hunyuan-video-i2v-33ch", 0),
        ("hunyuan-video", 0),
        ("wan2.2-ti2v-5b-i2v", 1),
        ("wan2.2-ti2v-5b", 0),
        ("wan2.1-i2v", 0),
    ],
)
def test_clean_first_frames_are_conditioning(name, frames):
    model, values = captured(name)
    with dit_accel.accelerate(model, **SPARSE) as acc:
        run(model, values)
        assert acc.engines["transformer"].state.prefix_frames == frames


def test_a_mask_that_is_no_length_makes_the_call_dense_and_says_so():
    model, values = captured("flux1-dev")
    tokens = values["hidden_states"].shape[1] + values["encoder_hidden_states"].shape[1]
    mask = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    mask[..., 5:400] = False
    values["joint_attention_kwargs"] = {"attention_mask": mask}
    stock = run(model, values)
    with dit_accel.accelerate(model, **SPARSE) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=0)
        assert acc.report().dense_reasons == {UNKNOWN_MASK: 4}


def test_flux2_with_a_cache_of_reference_keys_is_refused():
    model, values = captured("flux2-dev")
    with dit_accel.accelerate(model, **SPARSE), pytest.raises(UnsupportedError, match="kv_cache_mode"):
        run(model, values | {"kv_cache_mode": "extract", "num_ref_tokens": 4})
