"""Training at a minute size: stages that stop and go on, half precision, and a pipeline at the end."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanPipeline

from dit_accel.errors import ConfigError
from dit_accel.samples import evaluate_tiny_wan, make_tiny_wan, train_tiny_wan, tune_tiny_wan_decoder
from dit_accel.samples.cheap_attention import PaddedCrossAttention
from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.repertoire import FULL, repertoire_of
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.team import Team
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.samples.tiny_wan_causal import CausalTeacher
from dit_accel.samples.tiny_wan_flow import FrameRope, flow_loss, train_transformer
from dit_accel.samples.tiny_wan_model import TinyWanSizes, make_text_encoder, make_tokenizer, make_transformer, make_vae
from dit_accel.samples.tiny_wan_probe import Probe
from dit_accel.samples.tiny_wan_recipes import (
    FULL_MODEL,
    RECIPES,
    CausalRecipe,
    Crop,
    Draw,
    FlowRecipe,
    Pace,
    Tuning,
    VaeRecipe,
)
from dit_accel.samples.tiny_wan_run import OutOfTime, Place, TrainingRun
from dit_accel.samples.tiny_wan_show import contact_sheet
from dit_accel.samples.tiny_wan_vae import encode_bank, reconstruction_loss, train_vae, tune_decoder
from dit_accel.samples.train_tiny_wan_causal import excerpts
from dit_accel.streaming import StreamSettings

MINUTE = replace(
    FULL_MODEL,
    sizes=TinyWanSizes(
        heads=1, layers=3, ffn_dim=32, latent_channels=4, vae_dim=8, vae_blocks=1, text_dim=16, text_layers=1
    ),
    vae=VaeRecipe((Crop(5, 16, 2), Crop(1, 16, 2)), Pace(3), edge_weight=1.0, ema=0.9, save_every=2),
    flow=FlowRecipe(
        Canvas(5, 16, 16),
        clips=5,
        draws=(Draw(2, 2, (1.0, 0.5, 0.0)), Draw(3, 2, (0.0, 0.5, 1.0))),
        pace=Pace(3),
        encode_batch=2,
        save_every=2,
    ),
    causal=CausalRecipe(Canvas(17, 16, 16, endless=True), clips=2, batch=2, pace=Pace(1), rates=(0.005, 5e-4)),
    workers=0,
)


def test_the_full_model_has_the_size_it_should():
    sizes = FULL_MODEL.sizes
    with torch.device("meta"):
        transformer, vae = make_transformer(sizes), make_vae(sizes)
    text = make_text_encoder(sizes, make_tokenizer(FULL))
    count = {part: sum(p.numel() for p in module.parameters()) for part, module in (("t", transformer), ("v", vae))}
    assert sizes.heads >= 6
    assert sizes.layers >= 8
    assert sizes.head_dim == 64
    assert 10e6 < count["t"] < 25e6
    # Transformer and autoencoder are stored in two bytes a weight, the text encoder in four.
    assert 2 * sum(count.values()) + 4 * sum(p.numel() for p in text.parameters()) < 39.5e6


def test_a_training_that_is_stopped_goes_on_to_a_pipeline(tmp_path):
    place, output = Place(tmp_path, is_half=True), tmp_path / "model"
    late = replace(place, deadline=0.0)
    with pytest.raises(OutOfTime, match="step 1 of"):
        train_vae(late, MINUTE, 0)
    vae = train_vae(place, MINUTE, 0)
    found = json.loads((tmp_path / "vae.json").read_text())
    assert found["steps"] == 3
    assert found["held_out_psnr"] > 3
    assert train_vae(late, MINUTE, 0).config == vae.config  # what is finished costs no time
    flow = MINUTE.flow
    with pytest.raises(OutOfTime, match="bank"):
        encode_bank(late, vae, MINUTE, flow.canvas, flow.clips, flow.encode_batch, 0)
    bank = encode_bank(place, vae, MINUTE, flow.canvas, flow.clips, flow.encode_batch, 0)
    assert bank.latents.shape == (5, 4, 3, 4, 4)
    assert len(bank.captions) == len(bank.objects) == 5
    for step in (1, 2):
        with pytest.raises(OutOfTime, match=f"step {step} of"):
            train_transformer(late, output, replace(MINUTE, flow=replace(flow, shown=0)), bank)
    train_transformer(late, output, MINUTE, bank)
    state = torch.load(tmp_path / "flow_checkpoint.pt", weights_only=True)
    assert state["step"] == 3
    assert state["seconds"] > 0
    assert [picture.name for picture in tmp_path.glob("samples_*")] == ["samples_00003.png"]
    pipe = WanPipeline.from_pretrained(output)
    assert repertoire_of(pipe.tokenizer) is FULL
    assert torch.isfinite(torch.cat([p.flatten() for p in pipe.transformer.parameters()])).all()


def test_two_processes_train_one_model(tmp_path, capsys):
    place = Place(tmp_path, team=Team(size=2))
    vae = train_vae(Place(tmp_path), MINUTE, 0)
    recipe = replace(MINUTE, flow=replace(MINUTE.flow, shown=0))
    bank = encode_bank(place, vae, recipe, recipe.flow.canvas, 5, 2, 0)
    with pytest.raises(OutOfTime, match="step 1 of"):
        replace(place, deadline=0.0).together(train_transformer, tmp_path / "model", recipe, bank)
    train_transformer(Place(tmp_path), tmp_path / "model", recipe, bank)  # one goes on with what two began
    assert torch.load(tmp_path / "flow_checkpoint.pt", weights_only=True)["step"] == 3
    assert WanPipeline.from_pretrained(tmp_path / "model").transformer.config.num_layers == 3
    with pytest.raises(ConfigError, match="expected 1, or more on cpu, got 2 on cuda"):
        train_tiny_wan.main(["--work", str(tmp_path), "--processes", "2", "--device", "cuda"])


def test_tuning_changes_the_decoder_alone_and_goes_on_after_a_stop(tmp_path):
    torch.manual_seed(1)
    vae, place = make_vae(MINUTE.sizes), Place(tmp_path)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    recipe = replace(MINUTE, vae=replace(MINUTE.vae, tuning=Tuning(Pace(2), Canvas(5, 16, 16), window=8)))
    with pytest.raises(OutOfTime, match="step 1 of"):
        tune_decoder(replace(place, deadline=0.0), vae, recipe, 0)
    tune_decoder(place, vae, recipe, 0)
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in changed} == {"decoder", "post_quant_conv"}
    assert all(weight.requires_grad for weight in vae.parameters())


def test_the_tuned_decoder_takes_the_place_of_the_other(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "model"
    random_wan_pipeline().save_pretrained(folder)
    monkeypatch.setattr(tune_tiny_wan_decoder, "WHOLE_CLIPS", Tuning(Pace(9), Canvas(5, 16, 16), window=16))
    monkeypatch.setattr(tune_tiny_wan_decoder, "reconstruction_psnr", lambda *_, **__: 12.5)
    before = AutoencoderKLWan.from_pretrained(folder / "vae").state_dict()
    tune_tiny_wan_decoder.main(["--model", str(folder), "--work", str(tmp_path / "work"), "--steps", "1"])
    assert "12.50 dB before, 12.50 dB after" in capsys.readouterr().out
    after = WanPipeline.from_pretrained(folder).vae.state_dict()
    tuned = torch.load(tmp_path / "work" / "decoder_checkpoint.pt", weights_only=True)["average"]
    for name, weight in before.items():
        if name in tuned:
            assert not torch.equal(weight, tuned[name]) or not weight.any(), name
        torch.testing.assert_close(after[name], tuned.get(name, weight), atol=1e-3, rtol=1e-3)


def test_the_command_says_by_its_status_that_it_must_be_called_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(RECIPES, "full", MINUTE)
    options = ["--size", "full", "--work", str(tmp_path / "work"), "--output", str(tmp_path / "model")]
    with pytest.raises(SystemExit) as stopped:
        train_tiny_wan.main([*options, "--max-minutes", "0", "--vae-steps", "2"])
    assert stopped.value.code == train_tiny_wan.UNFINISHED
    assert "again" in capsys.readouterr().out
    assert (tmp_path / "work" / "vae_checkpoint.pt").exists()


def test_one_command_makes_both_models_and_judges_them(tmp_path, capsys):
    preset, work, output = tmp_path / "mine.yaml", tmp_path / "work", tmp_path / "made"
    preset.write_text(
        "extends: tiny-wan/dense\ngeneration: {height: 16, width: 16, num_frames: 5, num_inference_steps: 2}\n"
        "stream: {steps: [1000.0], chunk: 2, window: 8, sink: 2, guidance_scale: 1.0}\n"
    )
    work.mkdir()
    output.mkdir()
    recipe = replace(MINUTE, flow=replace(MINUTE.flow, shown=0))
    make_tiny_wan.make(Place(work), output, recipe, seed=0, prompts=2, preset=str(preset))
    told = capsys.readouterr().out
    assert told.count("| 2 |") == 3  # generated, drawn, and through the autoencoder
    assert [np.load(file)["clip"].shape for file in output.glob("clips-*/*.npz")] == [(5, 16, 16, 3)] * 2
    assert len(json.loads((output / "verdicts.json").read_text())) == 2
    assert json.loads((output / "streams.json").read_text())["found"]
    assert {path.stem for path in work.glob("*.done")} == {"model", "causal", "clips", "streams"}
    make_tiny_wan.make(Place(work, deadline=0.0), output, recipe, seed=0, prompts=2, preset=str(preset))
    assert "stage" not in capsys.readouterr().out
    (work / "clips.done").unlink()
    with pytest.raises(OutOfTime, match="clips"):
        make_tiny_wan.make(Place(work, deadline=0.0), output, recipe, seed=0, prompts=2, preset=str(preset))


def test_prompts_of_one_repertoire_are_judged_in_half_precision(tmp_path, capsys):
    preset, folder = tmp_path / "mine.yaml", tmp_path / "model"
    preset.write_text("extends: tiny-wan/dense\ngeneration: {height: 32, width: 32, num_frames: 5}\n")
    random_wan_pipeline().save_pretrained(folder)
    options = ["--model", str(folder), "--num-prompts", "1", "--steps", "1", "--half"]
    evaluate_tiny_wan.main(["--preset", str(preset), "--repertoire", "full", *options])
    told = capsys.readouterr().out
    assert "in bfloat16" in told
    assert "num_inference_steps=1" in told
    assert "texture" in told  # of the full repertoire, which this model does not know
    with pytest.raises(SystemExit):
        evaluate_tiny_wan.main(["--processes", "2", "--device", "cuda"])
    assert "expected 1, or more on a CPU, got 2 on cuda" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        evaluate_tiny_wan.main(["--preset", "tiny-wan/radial", *options])
    assert "expected a dense preset and a CPU, got tiny-wan/radial" in capsys.readouterr().err


def test_minutes_can_be_stretched_and_steps_cannot():
    longer = train_tiny_wan.stretch(FULL_MODEL, 0.5)
    assert longer.flow.pace.minutes == FULL_MODEL.flow.pace.minutes / 2
    assert longer.vae.pace.minutes == FULL_MODEL.vae.pace.minutes / 2
    assert longer.causal.pace.minutes == FULL_MODEL.causal.pace.minutes / 2
    assert train_tiny_wan.stretch(RECIPES["small"], 0.5) == RECIPES["small"]


def test_a_stage_ends_after_its_steps_or_its_minutes(tmp_path):
    assert Pace(100).done(50, 1e9) == 0.5
    assert Pace(100, minutes=2).done(10, 60) == 0.5
    assert Pace(100, minutes=2).done(90, 60) == 0.9
    model = torch.nn.Linear(2, 2)
    run = TrainingRun(Place(tmp_path), "some", model, [(torch.optim.SGD(model.parameters(), lr=1.0), 1.0)], 0.0)
    seen = []
    for step, done in run.steps(Pace(10**9, minutes=0.1 / 60)):
        time.sleep(0.03)
        seen.append((step, done))
    assert [step for step, _ in seen] == list(range(len(seen)))
    assert 2 <= len(seen) <= 4
    assert seen[0][1] < 0.1 < seen[-1][1] < 1
    later = TrainingRun(Place(tmp_path), "some", model, run.optimizers, 0.0)
    assert later.seconds >= 0.1
    assert list(later.steps(Pace(10**9, minutes=0.1 / 60))) == []


def test_losses_and_clips_follow_their_tensors_to_another_device():
    # The meta device refuses tensors of the processor as a GPU does.
    sizes, canvas = MINUTE.sizes, Canvas(5, 16, 16)
    model, vae = make_transformer(sizes).to("meta"), make_vae(sizes).to("meta")
    cross = PaddedCrossAttention(FULL.text_tokens)
    model.set_attn_processor({n: cross if "attn2" in n else p for n, p in model.attn_processors.items()})
    model.rope = FrameRope(model.rope, 3)
    probe = Probe(model, (3, 4, 4), repertoire=FULL).to("meta")
    drawn = next(FULL.batches(0, canvas, 2, device="meta"))
    latents = vae.encode(drawn.pixels).latent_dist.mean
    reconstruction_loss(vae.decode(latents).sample, drawn.pixels, 1.0).backward()
    words, objects = torch.empty(2, 48, sizes.text_dim, device="meta"), torch.zeros(2, 3, 4, 4, device="meta").bool()
    loss = flow_loss(model, lambda _: words, latents.detach(), objects, drawn.captions, 3.0)
    (loss + probe.loss(model.rope.chosen, drawn.captions, objects)).backward()
    Muon(split_parameters(model)[0], is_stacked=True).step()
    model.set_attn_processor({n: cross if "attn2" in n else p for n, p in model.attn_processors.items()})
    model.rope = model.rope.stock
    teacher, clip = CausalTeacher(model, (4, 4), 3.0), torch.empty(2, 4, 4, 4, 4, device="meta")
    settings = StreamSettings(chunk=1, window=4, sink=1, positions="reindex")
    mask = torch.zeros(2, 4, 4, 4, dtype=torch.bool, device="meta")
    for _ in range(3):  # with a past as it is, and with one that the model made
        teacher.loss(excerpts(settings, 4)[0][0], clip, mask, words).backward()
    assert {p.grad.device.type for p in model.parameters() if p.grad is not None} == {"meta"}


def test_blurred_edges_cost_more_when_edges_weigh():
    sharp = torch.zeros(1, 3, 1, 8, 8)
    sharp[..., 4:] = 1.0
    shifted = sharp + 0.1
    blurred = torch.nn.functional.avg_pool3d(sharp, (1, 1, 3), 1, (0, 0, 1), count_include_pad=False)
    torch.testing.assert_close(reconstruction_loss(shifted, sharp, 1.0), reconstruction_loss(shifted, sharp, 0.0))
    assert reconstruction_loss(blurred, sharp, 1.0) > reconstruction_loss(blurred, sharp, 0.0)
    # A step of 1 becomes three of a third: two thirds are lost in the middle, and a third appears on either side.
    found = reconstruction_loss(blurred, sharp, 1.0) - reconstruction_loss(blurred, sharp, 0.0)
    assert found.item() == pytest.approx(4 / 3 / 7 / 2, rel=1e-4)


def test_a_contact_sheet_has_a_row_per_clip():
    clips = [np.full((9, 8, 12, 3), shade, np.uint8) for shade in (10, 200)]
    sheet = contact_sheet(clips, ["one", "two"])
    assert sheet.shape == (2 * (14 + 16), 6 * 24, 3)
    assert (sheet[14:30] == 10).all()
    assert (sheet[44:] == 200).all()


def test_muon_takes_a_closure():
    torch.manual_seed(0)
    start, target = torch.randn(12, 20), torch.randn(12, 20)
    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    closed, plain = (Muon([weight]) for weight in weights)

    def loss_of(weight):
        weight.grad = None
        loss = (weight - target).square().sum()
        loss.backward()
        return loss.item()

    losses = [closed.step(lambda: loss_of(weights[0])) for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    for _ in range(3):
        loss_of(weights[1])
        assert plain.step() is None
    assert torch.equal(*weights)


def test_muon_in_stacks_steps_as_one_weight_at_a_time():
    torch.manual_seed(0)
    shapes = [(12, 20), (20, 12), (12, 20), (12, 5, 4)]
    models = [[torch.nn.Parameter(torch.randn(shape)) for shape in shapes]]
    models.append([torch.nn.Parameter(weight.detach().clone()) for weight in models[0]])
    optimizers = [
        Muon(model, weight_decay=0.1, is_stacked=is_stacked)
        for model, is_stacked in zip(models, (False, True), strict=True)
    ]
    for _ in range(2):
        for one, other in zip(*models, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(*models, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()
