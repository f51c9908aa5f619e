"""IP-adapters of FLUX, loaded from files in the published layout and set on the processors alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captured import captured, run
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from safetensors.torch import save_file
from transformers import CLIPVisionModelWithProjection

import dit_accel
from dit_accel.errors import UnsupportedError
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline
from dit_accel.samples.tiny_random.registry import tiny_image
from dit_accel.samples.tiny_random.text import WIDTH, clip_vision_config

BLOCKS, INNER, TEXT, TOKENS = 2, 32, WIDTH, 4


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder with an image encoder and two adapters: one file under each of the published naming schemes."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    CLIPVisionModelWithProjection(clip_vision_config(32)).save_pretrained(folder / "image_encoder")
    for file, image, blocks in (
        ("xlabs.safetensors", "ip_adapter_proj_model", "double_blocks.{}.processor.ip_adapter_double_stream_{}_proj"),
        ("plain.safetensors", "image_proj", "ip_adapter.{}.to_{}_ip"),
    ):
        tensors = {
            f"{image}.proj.weight": torch.randn(TOKENS * TEXT, WIDTH),
            f"{image}.proj.bias": torch.randn(TOKENS * TEXT),
            f"{image}.norm.weight": torch.ones(TEXT),
            f"{image}.norm.bias": torch.zeros(TEXT),
        }
        for name in (blocks.format(i, part) for i in range(BLOCKS) for part in "kv"):
            tensors |= {f"{name}.weight": torch.randn(INNER, TEXT), f"{name}.bias": torch.randn(INNER)}
        save_file(tensors, folder / file)
    return folder


def loaded(folder, *files):
    pipe = tiny_pipeline("flux1-dev")
    pipe.load_ip_adapter(
        str(folder),
        weight_name=list(files),
        image_encoder_pretrained_model_name_or_path=str(folder / "image_encoder"),
        image_encoder_dtype=torch.float32,
        local_files_only=True,
    )
    return pipe


def latents(pipe, images=1, **more):
    values = tiny_arguments("flux1-dev") | {"output_type": "latent"} | more
    if images:
        values["ip_adapter_image"] = [tiny_image(seed=i) for i in range(images)]
    return pipe(**values)[0].detach().numpy()


@pytest.mark.parametrize("files", [("xlabs.safetensors",), ("xlabs.safetensors", "plain.safetensors")])
def test_adapters_loaded_from_files_give_what_they_give_without_us(published, files):
    pipe, images = loaded(published, *files), len(files)
    stock, plain = latents(pipe, images), latents(tiny_pipeline("flux1-dev"), 0)
    assert np.abs(stock - plain).max() > 1e-3
    pipe.set_ip_adapter_scale(0.3)
    weaker = latents(pipe, images)
    assert np.abs(weaker - stock).max() > 1e-3
    pipe.set_ip_adapter_scale(1.0)
    before = dict(pipe.transformer.attn_processors)
    with dit_accel.accelerate(pipe, method="dense") as acc:
        np.testing.assert_allclose(latents(pipe, images), stock, atol=1e-5)
        assert len(acc.report().calls) == 2 * 4  # steps x layers; the image tokens' attention is left alone
        pipe.set_ip_adapter_scale(0.3)
        np.testing.assert_allclose(latents(pipe, images), weaker, atol=1e-5)
    assert all(pipe.transformer.attn_processors[key] is processor for key, processor in before.items())
    np.testing.assert_array_equal(latents(pipe, images), weaker)
    pipe.unload_ip_adapter()
    np.testing.assert_array_equal(latents(pipe, 0), plain)


def test_adapters_stand_beside_sparse_attention_and_guidance(published):
    pipe = loaded(published, "xlabs.safetensors")
    guided = {"negative_prompt": "blurred", "true_cfg_scale": 3.0}
    stock = latents(pipe, **guided)
    full = {"method": "composed", "order": "raster", "density": 1.0, "break_even": 1.0}
    tiles = {"method": "sliding_tile", "tile": [1, 2, 2], "window": [0, 0, 0], "break_even": 1.0}
    for everything in (full, tiles):  # tokens stand in tiles through all blocks under the second
        with dit_accel.accelerate(pipe, **everything) as acc:
            np.testing.assert_allclose(latents(pipe, **guided), stock, atol=1e-4)
            assert acc.report().dense_reasons == {}
            assert acc.engines["transformer"].standing.is_hoisted == (everything is tiles)
    with dit_accel.accelerate(pipe, **full | {"density": 0.1, "tile": [1, 2, 2]}):
        assert np.abs(latents(pipe, **guided) - stock).max() > 1e-4


def test_loading_and_unloading_under_acceleration_is_refused(published):
    pipe = loaded(published, "xlabs.safetensors")
    with dit_accel.accelerate(pipe, method="dense"), pytest.raises(UnsupportedError, match=r"remove\(\) before"):
        pipe.unload_ip_adapter()
    pipe = tiny_pipeline("flux1-dev")
    with dit_accel.accelerate(pipe, method="dense"), pytest.raises(UnsupportedError, match=r"remove\(\) before"):
        pipe.load_ip_adapter(
            str(published), "plain.safetensors", image_encoder_pretrained_model_name_or_path=None, local_files_only=True
        )


def with_adapters(scale):
    model, values = captured("flux1-dev")
    torch.manual_seed(0)
    for block in model.transformer_blocks:
        block.attn.set_processor(FluxIPAdapterAttnProcessor(32, 8, num_tokens=(4, 3), scale=[scale, 0.5 * scale]))
    tokens = [torch.randn(1, 4, 8), torch.randn(1, 3, 8)]
    return model, values | {"joint_attention_kwargs": {"ip_hidden_states": tokens}}


def test_adapters_of_different_size_are_kept_under_their_names():
    model, values = with_adapters(0.7)
    other, other_values = with_adapters(0.2)
    stock, weaker = run(model, values), run(other, other_values)
    assert not torch.allclose(stock, weaker, atol=1e-4)
    names = list(model.state_dict())
    with dit_accel.accelerate(model, method="dense"):
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=0)
        assert list(model.state_dict()) == names
        for processor in model.attn_processors.values():
            if isinstance(processor, FluxIPAdapterAttnProcessor):
                processor.scale = [0.2, 0.1]
        torch.testing.assert_close(run(model, values), weaker, atol=1e-6, rtol=0)
    torch.testing.assert_close(run(model, values), weaker, atol=1e-6, rtol=0)
