"""First stages of training: the autoencoder, its latent statistics, and the bank of encoded clips."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.repertoire import BASIC, Repertoire
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.tiny_wan_model import TinyWanSizes, make_vae
from dit_accel.samples.tiny_wan_recipes import Recipe, VaeRecipe
from dit_accel.samples.tiny_wan_run import Place, TrainingRun, cosine_rate, linear_rate

_HELD_OUT_SEED, _WHOLE = 10_000_019, Canvas(33, 64, 64)
_TUNING_SEED, _TUNING_EMA = 4242, 0.98
_JITTER = 0.02  # noise on the latents while the decoder learns


@dataclass(frozen=True)
class Bank:
    """Encoded clips of one size.

    Args:
        latents: normalised, fp16, `[clips, channels, frames, height, width]`.
        objects: which latent pixels show some of the object, bool `[clips, frames, height, width]`.
        captions: one per clip.
    """

    latents: Tensor
    objects: Tensor
    captions: list[str]


def train_vae(place: Place, recipe: Recipe, seed: int) -> AutoencoderKLWan:
    """Train (or resume, or load) the autoencoder and measure its latent statistics.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    finished, weights = place.work / "vae.json", place.work / "vae.safetensors"
    if finished.exists():
        return load_vae(place.work, recipe.sizes).to(place.device).eval()
    vae = make_vae(recipe.sizes).to(place.device)
    steps = place.together(fit_vae, vae, recipe, seed)
    vae.eval()
    if recipe.vae.tuning is not None:
        place.together(tune_decoder, vae, recipe, seed)
    mean, std = latent_statistics(vae, recipe.repertoire, seed)
    psnr = reconstruction_psnr(vae, repertoire=recipe.repertoire, canvas=recipe.flow.canvas)
    print(f"autoencoder: held-out PSNR {psnr:.2f} dB", flush=True)
    save_file({name: value.cpu() for name, value in vae.state_dict().items()}, weights)
    finished.write_text(json.dumps({"mean": mean, "std": std, "steps": steps, "held_out_psnr": psnr}))
    return train_vae(place, recipe, seed)


def load_vae(work: Path, sizes: TinyWanSizes) -> AutoencoderKLWan:
    """The finished autoencoder of a work folder."""
    statistics = json.loads((work / "vae.json").read_text())
    vae = make_vae(sizes, statistics["mean"], statistics["std"])
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    return vae


def fit_vae(place: Place, vae: AutoencoderKLWan, recipe: Recipe, seed: int) -> int:
    """Train; the averaged weights end in `vae`. The number of steps that took.

    Args:
        place: where to run, and until when.
        vae: what is trained.
        recipe, seed: as everywhere.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    settings: VaeRecipe = recipe.vae
    hidden, rest = split_parameters(vae, skip=("conv_in", "conv_out", "quant_conv", "gamma"))
    optimizers = [
        (Muon(hidden, is_stacked=place.is_gpu, is_half=place.is_half), settings.rates[0]),
        (torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0), settings.rates[1]),
    ]
    run = TrainingRun(place, "vae", vae, optimizers, settings.ema, save_every=settings.save_every)
    streams = [
        recipe.repertoire.batches(
            seed + 1000 * run.first + number + place.team.apart,
            Canvas(crop.frames, crop.side, crop.side),
            place.team.part(crop.batch),
            device=place.device,
            workers=place.team.drawing(recipe.workers) // len(settings.crops),
        )
        for number, crop in enumerate(settings.crops)
    ]
    step = run.first
    for step, done in run.steps(settings.pace):
        pixels = next(streams[step % len(streams)]).pixels
        with place.precision():
            mean = vae.encode(pixels).latent_dist.mean
            decoded = vae.decode(mean + _JITTER * torch.randn_like(mean)).sample
        loss = reconstruction_loss(decoded.float(), pixels, settings.edge_weight) + 1e-5 * mean.float().square().mean()
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, cosine_rate(step, done))
        run.log("autoencoder", step, done, loss)
    vae.load_state_dict(run.average)
    return step + 1


def tune_decoder(place: Place, vae: AutoencoderKLWan, recipe: Recipe, seed: int) -> None:
    """Train (or resume) the decoder alone as `recipe.vae.tuning` says; the averaged weights end in `vae`.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    settings = recipe.vae.tuning
    assert settings is not None
    vae.requires_grad_(False)
    decoder = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv}).requires_grad_(True)
    hidden, rest = split_parameters(decoder, skip=("conv_in", "conv_out", "quant_conv", "gamma"))
    optimizers = [
        (Muon(hidden, is_stacked=place.is_gpu), 0.005),
        (torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0), 5e-4),
    ]
    run = TrainingRun(place, "decoder", decoder, optimizers, _TUNING_EMA, save_every=recipe.vae.save_every)
    stream = recipe.repertoire.batches(
        seed + 1000 * run.first + _TUNING_SEED + place.team.apart,
        settings.canvas,
        place.team.part(settings.batch),
        device=place.device,
        workers=place.team.drawing(recipe.workers),
    )
    for step, done in run.steps(settings.pace):
        pixels = _cut(next(stream).pixels, settings.window)
        with place.precision():
            with torch.no_grad():
                mean = vae.encode(pixels).latent_dist.mean
            decoded = vae.decode(mean + _JITTER * torch.randn_like(mean)).sample
        loss = reconstruction_loss(decoded.float(), pixels, settings.edge_weight)
        run.backward(loss)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, linear_rate(step, done))
        run.log("decoder", step, done, loss)
    decoder.load_state_dict(run.average)
    vae.requires_grad_(True)


def _cut(pixels: Tensor, window: int) -> Tensor:
    """A window of clips `[B, 3, T, H, W]` at a random place of the latent grid."""
    top, left = (4 * int(torch.randint((size - window) // 4 + 1, ())) for size in pixels.shape[-2:])
    return pixels[..., top : top + window, left : left + window]


def reconstruction_loss(decoded: Tensor, pixels: Tensor, edge_weight: float) -> Tensor:
    """Absolute and squared error of clips `[B, 3, T, H, W]`, and the absolute one of their edges.

    Args:
        decoded, pixels: in [-1, 1].
        edge_weight: of the error of differences between neighbouring pixels: mean errors alone leave edges blurred, and
            edges are what tells one shape from another.
    """
    error = decoded - pixels
    loss = error.abs().mean() + error.square().mean()
    if edge_weight:
        loss = loss + edge_weight * (error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()) / 2
    return loss


@torch.no_grad()
def latent_statistics(vae: AutoencoderKLWan, repertoire: Repertoire, seed: int) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel."""
    stream = repertoire.batches(seed + 1, Canvas(9, 48, 48), 8, device=vae.device)
    latents = torch.cat([vae.encode(drawn.pixels).latent_dist.mean for drawn in islice(stream, 8)])
    channels = latents.transpose(0, 1).flatten(1)
    return channels.mean(1).tolist(), channels.std(1).tolist()


@torch.no_grad()
def reconstruction_psnr(
    vae: AutoencoderKLWan, clips: int = 16, repertoire: Repertoire = BASIC, canvas: Canvas = _WHOLE
) -> float:
    """Mean PSNR in dB over clips of held-out combinations. Default: as long as those that are generated."""
    values = []
    stream = repertoire.batches(_HELD_OUT_SEED, canvas, 1, held_out=True, device=vae.device)
    for drawn in islice(stream, clips):
        decoded = vae.decode(vae.encode(drawn.pixels).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * math.log10(((decoded - drawn.pixels) / 2).square().mean().item()))
    return sum(values) / len(values)


@torch.no_grad()
def encode_bank(
    place: Place, vae: AutoencoderKLWan, recipe: Recipe, canvas: Canvas, clips: int, batch: int, seed: int
) -> Bank:
    """Encode `clips` clips once, `batch` at a time, so that training steps do not pay for the autoencoder."""
    name = f"bank_{canvas.frames}x{canvas.height}x{canvas.width}_{clips}" + "_bounces" * canvas.endless
    tensors, texts = place.work / f"{name}.safetensors", place.work / f"{name}.json"
    if not texts.exists():
        begun = time.monotonic()
        mean, std = (
            torch.tensor(values, device=vae.device).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        stream = recipe.repertoire.batches(
            seed + 7919 * canvas.frames, canvas, batch, device=vae.device, workers=recipe.workers
        )
        latents, objects, captions = [], [], []
        for drawn in islice(stream, -(-clips // batch)):
            place.check_time(f"bank {name}")
            with place.precision():
                encoded = vae.encode(drawn.pixels).latent_dist.mean
            latents.append(((encoded.float() - mean) / std).half().cpu())
            objects.append(_to_latent_grid(drawn.objects, vae).cpu())
            captions += drawn.captions
        encoded_bank = {"latents": torch.cat(latents)[:clips], "objects": torch.cat(objects)[:clips]}
        save_file({part: values.contiguous() for part, values in encoded_bank.items()}, tensors)
        texts.write_text(json.dumps(captions[:clips]))
        print(f"bank {name}: {time.monotonic() - begun:.0f} s", flush=True)
    stored = load_file(tensors, device=place.device)
    return Bank(stored["latents"], stored["objects"], json.loads(texts.read_text()))


def _to_latent_grid(masks: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """Pixel masks `[B, T, H, W]` to the autoencoder's grid: the first frame has a latent frame of its own."""
    space, time_factor = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    pooled = torch.nn.functional.max_pool2d(masks.float(), space)
    later = pooled[:, 1:].unflatten(1, (-1, time_factor)).amax(2)
    return torch.cat([pooled[:, :1], later], dim=1).bool()
