"""Every family and variant, through its whole pipeline: dense through us is stock, sparse runs, remove restores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captured import ONE_PER_TRANSFORMER, captured, processors, run
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch.utils._python_dispatch import TorchDispatchMode

import dit_accel
from dit_accel.families.processor import AccelProcessor
from dit_accel.samples.tiny_random import TINY, tiny_arguments, tiny_names, tiny_pipeline

SPARSE = {"method": "composed", "tile": [1, 2, 2], "density": 0.1, "break_even": 1.0}
GRIDS = {"wan2.1-vace": (4, 4, 6), "hunyuan-video-1.5": (3, 8, 12), "hunyuan-video-1.5-i2v": (3, 6, 9)}
GRIDS |= {"flux1-kontext": (2, 8, 12), "flux2-dev-edit": (2, 16, 24)}
GRIDS |= {"cogvideox1.5-5b": (2, 4, 6), "cogvideox1.5-5b-i2v": (2, 4, 6)}
GRIDS |= {"ltx-video": (3, 8, 16), "ltx-2": (3, 8, 16)}
BRANCHES = {"WanPipeline": {"cond", "uncond"}, "CogVideoXPipeline": {"cond_uncond"}, "FluxPipeline": {"cond"}}
BRANCHES |= {"LTX2Pipeline": {"cond_uncond", "uncond_stg", "uncond_modality"}}
BRANCHES |= {"HunyuanVideo15Pipeline": {"pred_cond", "pred_uncond"}, "HunyuanVideoPipeline": {"cond"}}


def latents(pipe, name):
    # Two steps where the second one belongs to the second expert.
    steps = 2 if getattr(pipe, "transformer_2", None) is not None else 1
    return np.asarray(pipe(**tiny_arguments(name, steps) | {"output_type": "latent"})[0].detach())


@pytest.mark.parametrize("name", tiny_names())
def test_whole_pipeline(name):
    pipe = tiny_pipeline(name)
    transformers = [m for m in (pipe.transformer, getattr(pipe, "transformer_2", None)) if m is not None]
    before = [processors(m) for m in transformers]
    stock = latents(pipe, name)
    with dit_accel.accelerate(pipe, method="dense") as acc:
        np.testing.assert_allclose(latents(pipe, name), stock, atol=1e-5)
        calls = acc.report().calls
        assert {c.component for c in calls} == set(acc.engines)
        assert len(acc.engines) == len(transformers)
    if TINY[name].pipeline in BRANCHES:
        assert {c.branch for c in calls} == BRANCHES[TINY[name].pipeline]
    with dit_accel.accelerate(pipe, **SPARSE) as acc:
        assert np.abs(latents(pipe, name) - stock).max() > 1e-4
        assert acc.report().dense_reasons == {}
        assert acc.report().density < 1
        default = (1, 8, 12) if TINY[name].is_image else (3, 4, 6)
        assert acc.engines["transformer"].state.grid == GRIDS.get(name, default)
    np.testing.assert_array_equal(latents(pipe, name), stock)
    for model, found in zip(transformers, before, strict=True):
        assert all(processors(model)[key] is processor for key, processor in found.items())


@pytest.mark.parametrize(
    ("name", "branches"),
    [
        ("flux1-dev", {"cond", "uncond"}),
        ("flux1-kontext", {"default", "second"}),
        ("hunyuan-video", {"cond", "uncond"}),
        ("qwen-image", {"cond", "uncond"}),
    ],
)
def test_guidance_of_distilled_models_by_a_second_call(name, branches):
    pipe = tiny_pipeline(name)
    values = {"negative_prompt": "blurred", "true_cfg_scale": 3.0, "output_type": "latent"}

    def guided():
        return np.asarray(pipe(**tiny_arguments(name) | values)[0].detach())

    stock = guided()
    with dit_accel.accelerate(pipe, method="dense"):
        np.testing.assert_allclose(guided(), stock, atol=1e-5)
    with dit_accel.accelerate(pipe, **SPARSE, refresh=2) as acc:
        once, calls = guided(), acc.report().calls
        np.testing.assert_array_equal(guided(), once)
    assert {(c.branch, c.step) for c in calls} == {(branch, step) for branch in branches for step in (0, 1)}


@pytest.mark.parametrize("name", ONE_PER_TRANSFORMER)
def test_lora_is_kept(name):
    from peft import LoraConfig

    model, values = captured(name)
    plain = run(model, values)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    stock = run(model, values)
    assert not torch.allclose(stock, plain, atol=1e-4)
    with dit_accel.accelerate(model, method="dense"):
        torch.testing.assert_close(run(model, values), stock, atol=1e-5, rtol=0)
    with dit_accel.accelerate(model, method="composed", density=1.0, break_even=1.0) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert acc.report().dense_reasons == {}


@pytest.mark.parametrize("name", ["wan2.1-t2v", "hunyuan-video", "flux1-dev", "flux2-dev", "cogvideox-5b"])
def test_lora_files_load_into_an_accelerated_pipeline(name, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor, pipe = tiny_pipeline(name), tiny_pipeline(name)
    donor.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    donor.save_lora_weights(tmp_path, transformer_lora_layers=get_peft_model_state_dict(donor.transformer))
    plain = latents(pipe, name)
    with dit_accel.accelerate(pipe, method="dense"):
        pipe.load_lora_weights(tmp_path)
        changed = latents(pipe, name)
    stock = latents(pipe, name)
    assert np.abs(stock - plain).max() > 1e-3
    np.testing.assert_allclose(changed, stock, atol=1e-5)
    with dit_accel.accelerate(pipe, method="dense"):
        pipe.fuse_lora()
        np.testing.assert_allclose(latents(pipe, name), stock, atol=1e-4)
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        np.testing.assert_allclose(latents(pipe, name), plain, atol=1e-5)


# HunyuanVideo-1.5: ours has no mask. CogVideoX: Diffusers' own processor does not obey the choice, ours does.
ROUNDING = {"hunyuan-video-1.5": 0.05, "cogvideox-5b": 0.02}


@pytest.mark.parametrize("name", [*ONE_PER_TRANSFORMER, "qwen-image"])
def test_half_precision_and_the_choice_of_diffusers_backend(name, monkeypatch):
    # Diffusers makes the choice for the whole process; this takes it back at the end.
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    model, values = captured(name)
    model.to(torch.bfloat16)
    values = {
        k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() and not k.endswith("_ids") else v
        for k, v in values.items()
    }
    model.set_attention_backend("_native_math")
    stock = run(model, values)
    assert stock.dtype == torch.bfloat16
    with dit_accel.accelerate(model, method="dense"):
        model.set_attention_backend("_native_math")
        torch.testing.assert_close(run(model, values), stock, atol=ROUNDING.get(name, 0), rtol=0)
    with dit_accel.accelerate(model, **SPARSE) as acc:
        assert run(model, values).dtype == torch.bfloat16
        assert acc.report().dense_reasons == {}


@pytest.mark.parametrize("name", ["wan2.1-t2v", "wan2.1-i2v", "wan2.1-vace", "flux1-dev", "flux2-dev", "cogvideox-5b"])
def test_fused_projections(name):
    model, values = captured(name)
    model.fuse_qkv_projections()
    stock = run(model, values)
    with dit_accel.accelerate(model, method="dense"):
        torch.testing.assert_close(run(model, values), stock, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5", "hunyuan-video-1.5-i2v"])
@pytest.mark.parametrize("parameters", [{"method": "dense"}, {"method": "composed", "density": 0.3, "break_even": 1.0}])
def test_prompts_of_different_length_in_one_batch(name, parameters):
    model, values = captured(name)
    batch = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in values.items()}
    batch["encoder_attention_mask"][1, 7:] = 0
    second = {k: v[1:] if isinstance(v, torch.Tensor) and v.ndim else v for k, v in batch.items()}
    stock = run(model, batch)
    assert not torch.allclose(stock[0], stock[1], atol=1e-4)
    with dit_accel.accelerate(model, **parameters) as acc:
        both = run(model, batch)
        assert len(set(acc.engines["transformer"].state.text_valid)) == 2
        torch.testing.assert_close(both[:1], run(model, values), atol=1e-5, rtol=0)
        torch.testing.assert_close(both[1:], run(model, second), atol=1e-5, rtol=0)
    if parameters["method"] == "dense":
        torch.testing.assert_close(both, stock, atol=1e-5, rtol=0)


@pytest.mark.parametrize("lengths", [(34, 34), (34, 7)])
def test_dense_calls_of_a_sparse_run_need_no_mask_for_equal_lengths(lengths, monkeypatch):
    model, values = captured("hunyuan-video")
    batch = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) and v.ndim else v for k, v in values.items()}
    batch["encoder_attention_mask"] = (torch.arange(256) < torch.tensor(lengths)[:, None]).long()
    stock, masks = run(model, batch), []
    plain = AccelProcessor.dense

    def spy(self, query, key, value, mask=None):
        masks.append(mask)
        return plain(self, query, key, value, mask)

    monkeypatch.setattr(AccelProcessor, "dense", spy)
    with dit_accel.accelerate(model, **SPARSE, dense_steps=1) as acc:
        torch.testing.assert_close(run(model, batch), stock, atol=1e-5, rtol=0)
        assert acc.report().dense_reasons == {"step 0 is in dense_steps [0, 1)": 4}
    assert [mask is None for mask in masks] == [lengths[0] == lengths[1]] * 4


class PairsOfTokens(TorchDispatchMode):
    """Notes whether any operation returns a tensor with an entry for (nearly) every pair of tokens."""

    def __init__(self, video, tokens):
        super().__init__()
        self.sizes, self.found = range(video, tokens + 1), False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor) and x.ndim > 1:
                self.found |= x.shape[-1] in self.sizes and x.shape[-2] in self.sizes
        return out


@pytest.mark.parametrize("parameters", [{"method": "dense"}, SPARSE])
def test_no_mask_of_all_pairs_is_made_for_hunyuan_video_15(parameters):
    model, values = captured("hunyuan-video-1.5")
    video, tokens = 288, 288 + 100 + 32 + 49
    with PairsOfTokens(video, tokens) as stock:
        run(model, values)
    assert stock.found
    with dit_accel.accelerate(model, **parameters), PairsOfTokens(video, tokens) as ours:
        run(model, values)
    assert not ours.found
