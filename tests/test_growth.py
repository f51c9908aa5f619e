"""Growing the small model: the larger starts by doing nearly what the smaller does, and learns with all it has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from dit_accel.samples import train_tiny_wan
from dit_accel.samples.cheap_attention import SelfAttentionInHalf, attend_in_half
from dit_accel.samples.growth import copied, grow_transformer
from dit_accel.samples.muon import orthogonalize
from dit_accel.samples.repertoire import BASIC
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.tiny_wan_model import (
    TinyWanSizes,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_pipeline,
)
from dit_accel.samples.tiny_wan_recipes import GROWN, RECIPES, Crop, Draw, Pace

SMALL = TinyWanSizes(heads=2, head_dim=16, layers=2, ffn_dim=48, latent_channels=4, vae_dim=8, text_dim=32)
LARGE = replace(SMALL, heads=3, layers=4, ffn_dim=80)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).detach().norm() / wanted.detach().norm())


def trained_transformer() -> WanTransformer3DModel:
    torch.manual_seed(0)
    model = make_transformer(SMALL)
    with torch.no_grad():
        model.proj_out.weight.normal_()
        for block in model.blocks:
            block.norm2.weight.normal_(1.0, 0.2)
            block.attn1.norm_q.weight.normal_(1.0, 0.2)
    return model


def test_a_grown_transformer_does_nearly_what_the_trained_one_does():
    model = trained_transformer()
    grown = grow_transformer(model, LARGE)
    latents, text, time = torch.randn(2, 4, 3, 4, 4), torch.randn(2, 5, 32), torch.tensor([200.0, 700.0])
    wanted = model(latents, time, text, return_dict=False)[0]
    found = grown(latents, time, text, return_dict=False)[0]
    fresh = make_transformer(LARGE)
    torch.nn.init.normal_(fresh.proj_out.weight)
    assert relative(found, wanted) < 0.25
    assert relative(fresh(latents, time, text, return_dict=False)[0], wanted) > 0.8


def test_all_that_is_new_in_a_grown_transformer_learns():
    grown = grow_transformer(trained_transformer(), LARGE)
    text = torch.randn(1, 5, 32)
    for _ in range(2):  # what new layers add is zero, so that what feeds it learns one step later
        out = grown(torch.randn(1, 4, 3, 4, 4), torch.tensor([500.0]), text, return_dict=False)[0]
        (out - torch.randn_like(out)).square().mean().backward()
        with torch.no_grad():
            for weight in grown.parameters():
                weight -= 0.01 * weight.grad
    still = [name for name, weight in grown.named_parameters() if not weight.grad.abs().max() > 0]
    assert not still


def test_copies_of_an_axis_start_with_itself_and_stay_whole():
    found = copied(6, 14, block=2, seed=3).view(-1, 2)
    assert found[:3].flatten().tolist() == list(range(6))
    assert (found[:, 1] == found[:, 0] + 1).all()
    assert sorted(found[3:6].flatten().tolist()) == list(range(6))  # none is copied twice before all are once


def test_attention_in_half_agrees_with_that_of_the_model():
    model = trained_transformer()
    latents, text = torch.randn(2, 4, 5, 8, 8), torch.randn(2, 5, 32)  # 320 tokens: more than one slice of queries
    results = []
    for is_half in (False, True):
        if is_half:
            for block in model.blocks:
                block.attn1.set_processor(SelfAttentionInHalf())
        model.zero_grad()
        out = model(latents, torch.tensor([300.0, 300.0]), text, return_dict=False)[0]
        out.square().mean().backward()
        weights = (
            model.blocks[0].attn1.to_q.weight,
            model.blocks[0].attn1.to_v.weight,
            model.blocks[1].attn1.to_k.weight,
        )
        results.append([out.detach(), *(weight.grad.clone() for weight in weights)])
    for wanted, found in zip(*results, strict=True):
        assert 0 < relative(found, wanted) < 0.02


def test_attention_in_half_takes_fewer_queries_than_keys():
    torch.manual_seed(0)
    results = []
    for attend in (attend_in_half, torch.nn.functional.scaled_dot_product_attention):
        generator = torch.Generator().manual_seed(1)
        parts = [torch.randn(2, 3, n, 16, generator=generator, requires_grad=True) for n in (270, 530, 530)]
        out = attend(*parts)
        out.square().mean().backward()
        assert out.dtype == torch.float32
        results.append([out.detach(), *(part.grad for part in parts)])
    for found, wanted in zip(*results, strict=True):
        assert 0 < relative(found, wanted) < 0.02


def test_muon_in_half_is_about_as_orthogonal():
    update = torch.randn(3, 40, 24)
    exact, half = orthogonalize(update), orthogonalize(update, is_half=True)
    assert half.dtype == update.dtype
    assert 0 < relative(half, exact) < 0.05


@pytest.fixture
def grown_recipe(monkeypatch):
    """The recipe at a minute size, in the place of the listed one."""
    flow = replace(GROWN.flow, canvas=Canvas(9, 16, 16), clips=6, draws=(Draw(3, 2, (1.0, 1.0, 1.0)),), pace=Pace(2))
    vae = replace(GROWN.vae, crops=(Crop(5, 16, 1),), pace=Pace(2), tuning=None)
    first = replace(GROWN.start, sizes=replace(SMALL, layers=3), vae=vae, flow=flow)
    recipe = replace(GROWN, sizes=LARGE, flow=flow, is_half=False, start=first)
    monkeypatch.setitem(RECIPES, "grown", recipe)


def check_grown(folder, start):
    """Grown and trained, with the other parts as they were."""
    for part in ("text_encoder", "vae"):
        kept, taken = (next((each / part).glob("*.safetensors")).read_bytes() for each in (start, folder))
        assert taken == kept
    pipe = WanPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    assert (pipe.transformer.config.num_layers, pipe.vae.config.z_dim) == (4, 4)
    text, size = "a red ball moving right", {"height": 16, "width": 16, "num_frames": 5}
    frames = pipe(text, **size, num_inference_steps=2, output_type="pt").frames
    assert frames.isfinite().all()


@pytest.mark.usefixtures("grown_recipe")
def test_one_command_makes_a_model_and_grows_it(tmp_path):
    options = ["--size", "grown", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="75"):
        train_tiny_wan.main([*options, "--max-minutes", "0"])
    train_tiny_wan.main(options)
    check_grown(tmp_path / "out", tmp_path / "work" / "start")
    first = WanTransformer3DModel.from_pretrained(tmp_path / "work" / "start" / "transformer")
    assert first.config.num_layers == 3


@pytest.mark.usefixtures("grown_recipe")
def test_a_finished_pipeline_is_grown(tmp_path, capsys):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(BASIC)
    parts = make_vae(SMALL, [0.0] * 4, [1.0] * 4), trained_transformer(), make_text_encoder(SMALL, tokenizer)
    save_pipeline(tmp_path / "small", *parts, tokenizer, SMALL)
    options = ["--start", str(tmp_path / "small"), "--work", str(tmp_path / "work"), "--output", str(tmp_path / "out")]
    train_tiny_wan.main(["--size", "grown", *options])
    check_grown(tmp_path / "out", tmp_path / "small")
    assert not (tmp_path / "work" / "start").exists()
    with pytest.raises(SystemExit):
        train_tiny_wan.main(["--size", "small", *options])
    assert "small makes its model from nothing; use it with --size grown" in capsys.readouterr().err
