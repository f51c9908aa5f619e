"""Last stages of training: the transformer with its text encoder by flow matching, and the export."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.tiny_wan_model import (
    TinyWanSizes,
    make_text_encoder,
    make_tokenizer,
    make_transformer,
    make_vae,
    save_pipeline,
)
from dit_accel.samples.tiny_wan_probe import Probe, probe_weight
from dit_accel.samples.tiny_wan_run import TrainingRun, replace_parts
from dit_accel.samples.tiny_wan_vae import Bank

if TYPE_CHECKING:
    from dit_accel.samples.train_tiny_wan import Draw

_TEXT = 24  # text tokens in training; the last is always padding
PIPELINE_TEXT = 512  # text tokens that WanPipeline attends unless told otherwise
_SHORT_TEXT, _SHORT_SHARE = 28, 0.8  # texts are padded to so many tokens at most, for which share of the steps
DROP_CAPTION = 0.12
DECAY = 0.1  # without it the output of cross-attention grows until it drowns everything else
_LAYOUT_SHARE, _LAYOUT_SHIFT = 0.5, 10.0  # of the samples: at noise levels where it is decided what goes where
_OBJECT_WEIGHT = 4.0  # of the loss where the object is; it covers a tenth of the picture
_EMA = 0.998
ADAM_PARTS = ("patch_embedding", "proj_out", "shared", "relative", "scale_shift")  # first and last layers, biases
_PHASES = (0.3, 0.75)  # shares of the steps at which the second and the third phase begin


class PaddedCrossAttention:
    """Cross-attention of training: one padding key stands for the many that WanPipeline attends.

    WanPipeline pads text embeddings with zeros to `max_sequence_length` and masks nothing. All padding
    keys are equal, so one of them with the bias ln(their number) gives the same output for a twentieth of the work.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self) -> None:
        self.bias = torch.zeros(1, 1, 1, _TEXT)
        self.pad_to(PIPELINE_TEXT)

    def pad_to(self, tokens: int) -> None:
        """Act as if texts were padded to `tokens`, at least 24."""
        self.bias[..., -1] = math.log(tokens - _TEXT + 1)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend `hidden_states` `[B, N, C]` to `encoder_hidden_states` `[B, 24, C]`."""
        q = attn.norm_q(attn.to_q(hidden_states))
        k, v = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q.dtype))
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return projected


class Captioner(nn.Module):
    """Captions to padded embeddings `[B, 24, text_dim]`, zero beyond each caption, as WanPipeline makes them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.tokenizer, self.encoder = tokenizer, encoder

    def forward(self, captions: list[str]) -> Tensor:
        """Embed `captions`; each must be shorter than 24 tokens."""
        batch = self.tokenizer(captions, padding="max_length", max_length=_TEXT, return_tensors="pt")
        mask = batch["attention_mask"]
        hidden: Tensor = self.encoder(batch["input_ids"], mask).last_hidden_state
        return hidden * mask.unsqueeze(-1)


class FrameRope(nn.Module):
    """Rotary embedding of chosen frames of a longer clip, at their true places in time.

    Args:
        stock: the transformer's own embedding.
        frames: how many latent frames the whole clip has.
    """

    def __init__(self, stock: nn.Module, frames: int) -> None:
        super().__init__()
        self.stock, self.frames = stock, frames
        self.chosen = torch.arange(frames)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines, `[1, T * H * W, 1, D]` each, for the chosen frames `[B, C, T, H, W]`."""
        whole = hidden_states.new_empty(1, 1, self.frames, *hidden_states.shape[-2:])
        cos, sin = (table.unflatten(1, (self.frames, -1))[:, self.chosen].flatten(1, 2) for table in self.stock(whole))
        return cos, sin


def choose_padding(done: float) -> int:
    """How far the texts of a step are padded when a share `done` of the steps is done: from 24 tokens on.

    At the 512 tokens to which WanPipeline pads, a caption's dozen words get one per cent of the attention of a model
    that does not know them yet, and it learns next to nothing of them. Once it knows them, it learns to overlook the
    padding, of any length up to those 512.
    """
    most = _SHORT_TEXT if done < _SHORT_SHARE else PIPELINE_TEXT
    return round(_TEXT * (most / _TEXT) ** torch.rand(()).item())


def choose_frames(frames: int, count: int) -> Tensor:
    """Sorted places of `count` of `frames` latent frames: the first, the last, and others at random."""
    inner = 1 + torch.randperm(frames - 2)[: count - 2]
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([frames - 1])])


def draw_levels(count: int, shift: float) -> Tensor:
    """Noise levels in (0, 1) `[count]`: logit-normal, shifted; some so far that they decide what goes where."""
    level = torch.sigmoid(torch.randn(count))
    shifts = torch.where(torch.rand(count) < _LAYOUT_SHARE, _LAYOUT_SHIFT, shift)
    return shifts * level / (1 + (shifts - 1) * level)


def velocity_error(predicted: Tensor, wanted: Tensor, objects: Tensor) -> Tensor:
    """Mean squared error of velocities `[B, C, T, H, W]`, weighted where `objects` (bool `[B, T, H, W]`) are."""
    weight = 1 + (_OBJECT_WEIGHT - 1) * objects.unsqueeze(1)
    return ((predicted - wanted).square() * weight).mean() / weight.mean()


def flow_loss(
    model: WanTransformer3DModel,
    text: Captioner,
    latents: Tensor,
    objects: Tensor,
    captions: list[str],
    shift: float,
) -> Tensor:
    """Flow-matching loss on clean `latents` `[B, C, T, H, W]`: predict noise - latents at a random noise level.

    `objects` (bool `[B, T, H, W]`) says where errors weigh more.
    """
    level = draw_levels(len(captions), shift)
    noise = torch.randn_like(latents)
    mix = level.view(-1, 1, 1, 1, 1)
    predicted = model(
        hidden_states=(1 - mix) * latents + mix * noise,
        timestep=level * 1000,
        encoder_hidden_states=text(captions),
        return_dict=False,
    )[0]
    return velocity_error(predicted, noise - latents, objects)


def train_transformer(
    work: Path,
    output: Path,
    sizes: TinyWanSizes,
    bank: Bank,
    draws: Sequence[Draw],
    steps: int,
) -> None:
    """Train (or resume) the transformer and its text encoder; export every few hundred steps and at the end."""
    tokenizer = make_tokenizer()
    model, text = make_transformer(sizes), Captioner(tokenizer, make_text_encoder(sizes, tokenizer))
    both = nn.ModuleDict({"transformer": model, "text": text})
    stock = model.attn_processors
    cross = PaddedCrossAttention()
    model.set_attn_processor({name: cross if "attn2" in name else p for name, p in stock.items()})
    _, _, total, height, width = bank.latents.shape
    model.rope = rope = FrameRope(model.rope, total)
    hidden, rest = split_parameters(both, skip=ADAM_PARTS)
    probe = Probe(model, (total, height, width))
    rest += probe.parameters()
    optimizers = [
        (Muon(hidden, weight_decay=DECAY), 0.02),
        (torch.optim.AdamW(rest, betas=(0.9, 0.97), weight_decay=0.0), 2e-3),
    ]
    run = TrainingRun(work / "flow_checkpoint.pt", both, optimizers, _EMA, {"probe": probe})
    for step in range(run.first, steps):
        phase = sum(step >= share * steps for share in _PHASES)
        draw = draws[int(torch.multinomial(torch.tensor([d.shares[phase] for d in draws]), 1))]
        rows = torch.randint(len(bank.captions), (draw.batch,))
        rope.chosen = choose_frames(total, draw.latent_frames)
        latents, objects = bank.latents[rows][:, :, rope.chosen].float(), bank.objects[rows][:, rope.chosen]
        cross.pad_to(choose_padding(step / steps))
        captions = ["" if torch.rand(()) < DROP_CAPTION else bank.captions[i] for i in rows]
        loss = flow_loss(model, text, latents, objects, captions, sizes.flow_shift)
        placing = probe.loss(rope.chosen, captions, objects)
        (loss + probe_weight(step / steps) * placing).backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, steps)
        run.log("flow", step, steps, loss, f"placing {placing.item():.3f}")
        if run.is_due(step, steps):
            run.save(step)
            export(work, output, sizes, run.average)


def export(work: Path, output: Path, sizes: TinyWanSizes, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a pipeline folder, under a temporary name that is renamed when complete."""
    tokenizer = make_tokenizer()
    model, encoder = make_transformer(sizes), make_text_encoder(sizes, tokenizer)
    nn.ModuleDict({"transformer": model, "text": Captioner(tokenizer, encoder)}).load_state_dict(average)
    statistics = json.loads((work / "vae.json").read_text())
    vae = make_vae(sizes, statistics["mean"], statistics["std"])
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(fresh, vae, model, encoder, tokenizer, sizes)
    replace_parts(fresh, output)
