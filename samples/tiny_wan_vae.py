"""First stages of training: the autoencoder, its latent statistics, and the bank of encoded clips."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file
from torch import Tensor

from dit_accel.samples.clips import captioned_clips
from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.tiny_wan_model import TinyWanSizes, make_vae

if TYPE_CHECKING:
    from dit_accel.samples.train_tiny_wan import Canvas

_SAVE_EVERY = 200
_HELD_OUT_SEED = 10_000_019
# Clip sizes of the autoencoder's steps, in turn: (frames, side, batch). Single frames are cheap and teach colour.
_CROPS = ((1, 48, 16), (9, 48, 4), (5, 48, 4))


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


def to_pixels(clips: list[np.ndarray]) -> Tensor:
    """uint8 clips `[T, H, W, 3]` to a batch in [-1, 1], `[B, 3, T, H, W]`."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_vae(work: Path, sizes: TinyWanSizes, steps: int, seed: int) -> AutoencoderKLWan:
    """Train (or resume, or load) the autoencoder and measure its latent statistics."""
    finished = work / "vae.json"
    if finished.exists():
        statistics = json.loads(finished.read_text())
        vae = make_vae(sizes, statistics["mean"], statistics["std"])
        vae.load_state_dict(load_file(work / "vae.safetensors"))
        return vae.eval()
    vae = make_vae(sizes)
    _fit_vae(vae, work, steps, seed)
    vae.eval()
    mean, std = _latent_statistics(vae, seed)
    psnr = reconstruction_psnr(vae)
    print(f"autoencoder: held-out PSNR {psnr:.2f} dB", flush=True)
    save_file(vae.state_dict(), work / "vae.safetensors")
    finished.write_text(json.dumps({"mean": mean, "std": std, "steps": steps, "held_out_psnr": psnr}))
    return train_vae(work, sizes, steps, seed)


def _fit_vae(vae: AutoencoderKLWan, work: Path, steps: int, seed: int) -> None:
    hidden, rest = split_parameters(vae, skip=("conv_in", "conv_out", "quant_conv", "gamma"))
    optimizers = [(Muon(hidden), 0.02), (torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0), 2e-3)]
    checkpoint, begun, first = work / "vae_checkpoint.pt", time.time(), 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        first = state["step"]
        vae.load_state_dict(state["model"])
        for (optimizer, _), saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    streams = [captioned_clips(seed + 1000 * first + i, f, s, s) for i, (f, s, _) in enumerate(_CROPS)]
    for step in range(first, steps):
        rate = min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * step / steps)) + 0.005
        crop = step % len(_CROPS)
        pixels = to_pixels([clip for clip, *_ in islice(streams[crop], _CROPS[crop][2])])
        mean = vae.encode(pixels).latent_dist.mean
        decoded = vae.decode(mean + 0.02 * torch.randn_like(mean)).sample
        error = decoded - pixels
        loss = error.abs().mean() + error.square().mean() + 1e-5 * mean.square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        for optimizer, lr in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            print(f"autoencoder step {step}/{steps} loss {loss.item():.4f} {time.time() - begun:.0f} s", flush=True)
        if step % _SAVE_EVERY == _SAVE_EVERY - 1:
            saved = [optimizer.state_dict() for optimizer, _ in optimizers]
            _save(checkpoint, {"step": step + 1, "model": vae.state_dict(), "optimizers": saved})


def _save(path: Path, state: dict[str, object]) -> None:
    torch.save(state, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


@torch.no_grad()
def _latent_statistics(vae: AutoencoderKLWan, seed: int) -> tuple[list[float], list[float]]:
    clips = [clip for clip, *_ in islice(captioned_clips(seed + 1, 9, 48, 48), 64)]
    latents = torch.cat([vae.encode(to_pixels(clips[i : i + 8])).latent_dist.mean for i in range(0, 64, 8)])
    channels = latents.transpose(0, 1).flatten(1)
    return channels.mean(1).tolist(), channels.std(1).tolist()


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKLWan, clips: int = 16) -> float:
    """Mean PSNR in dB over clips of held-out combinations, 9 frames of 48 x 48."""
    values = []
    for clip, *_ in islice(captioned_clips(_HELD_OUT_SEED, 9, 48, 48, held_out=True), clips):
        pixels = to_pixels([clip])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        values.append(-10 * math.log10(((decoded - pixels) / 2).square().mean().item()))
    return sum(values) / len(values)


@torch.no_grad()
def encode_bank(work: Path, vae: AutoencoderKLWan, canvas: Canvas, seed: int) -> Bank:
    """Encode `canvas.clips` clips once, so that training steps do not pay for the autoencoder."""
    name = f"bank_{canvas.frames}x{canvas.height}x{canvas.width}_{canvas.clips}" + "_bounces" * canvas.bounces
    tensors, texts = work / f"{name}.safetensors", work / f"{name}.json"
    if not texts.exists():
        begun = time.time()
        mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        size = (canvas.frames, canvas.height, canvas.width)
        stream = captioned_clips(seed + 7919 * canvas.frames, *size, bounces=canvas.bounces)
        latents, objects, captions = [], [], []
        for first in range(0, canvas.clips, 8):
            clips, words, masks = zip(*islice(stream, min(8, canvas.clips - first)), strict=True)
            latents.append(((vae.encode(to_pixels(list(clips))).latent_dist.mean - mean) / std).half())
            objects.append(_to_latent_grid(torch.from_numpy(np.stack(masks)), vae))
            captions += words
        save_file({"latents": torch.cat(latents), "objects": torch.cat(objects)}, tensors)
        texts.write_text(json.dumps(captions))
        print(f"bank {name}: {time.time() - begun:.0f} s", flush=True)
    stored = load_file(tensors)
    return Bank(stored["latents"], stored["objects"], json.loads(texts.read_text()))


def _to_latent_grid(masks: Tensor, vae: AutoencoderKLWan) -> Tensor:
    """Pixel masks `[B, T, H, W]` to the autoencoder's grid: the first frame has a latent frame of its own."""
    space, time_factor = vae.config.scale_factor_spatial, vae.config.scale_factor_temporal
    pooled = torch.nn.functional.max_pool2d(masks.float(), space)
    later = pooled[:, 1:].unflatten(1, (-1, time_factor)).amax(2)
    return torch.cat([pooled[:, :1], later], dim=1).bool()
