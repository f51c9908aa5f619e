"""Last stages of training: the transformer with its text encoder by flow matching, and the export."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from dit_accel.samples.cheap_attention import PIPELINE_TEXT, PaddedCrossAttention, SelfAttentionInHalf
from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.repertoire import BASIC
from dit_accel.samples.tiny_wan_model import make_text_encoder, make_tokenizer, make_transformer, save_pipeline
from dit_accel.samples.tiny_wan_probe import Probe
from dit_accel.samples.tiny_wan_recipes import Recipe
from dit_accel.samples.tiny_wan_run import Place, TrainingRun, linear_rate, replace_parts
from dit_accel.samples.tiny_wan_show import show_samples
from dit_accel.samples.tiny_wan_vae import Bank, load_vae

_SHORT, _SHORT_SHARE = 4, 0.8  # texts are padded by so many tokens at most, for which share of the steps
DROP_CAPTION = 0.12
DECAY = 0.1  # without it the output of cross-attention grows until it drowns everything else
_LAYOUT_SHARE, _LAYOUT_SHIFT = 0.5, 10.0  # of the samples: at noise levels where it is decided what goes where
_OBJECT_WEIGHT = 4.0  # of the loss where the object is; it covers a tenth of the picture
_CONTRAST, _GAINS = 1.9, (0.6, 3.0)  # usual squared distance of objects from their backdrop; least and most gain
_EMA = 0.998
ADAM_PARTS = ("patch_embedding", "proj_out", "shared", "relative", "scale_shift")  # first and last layers, biases
Start = tuple[WanTransformer3DModel, UMT5EncoderModel]
_PHASES = (0.3, 0.75)  # shares of the steps at which the second and the third phase begin


class Captioner(nn.Module):
    """Captions to padded embeddings `[B, L, text_dim]`, zero beyond each caption, as WanPipeline makes them.

    Args:
        tokenizer, encoder: of the pipeline.
        tokens: L. Default: that of the basic repertoire.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, tokens: int = BASIC.text_tokens
    ) -> None:
        super().__init__()
        self.tokenizer, self.encoder, self.tokens = tokenizer, encoder, tokens

    def forward(self, captions: list[str]) -> Tensor:
        """Embed `captions`; each must be shorter than L tokens."""
        batch = self.tokenizer(captions, padding="max_length", max_length=self.tokens, return_tensors="pt")
        batch = batch.to(self.encoder.device)
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


def choose_padding(done: float, tokens: int = BASIC.text_tokens) -> int:
    """How far the texts of a step are padded when a share `done` of the steps is done: from `tokens` on.

    At the 512 tokens to which WanPipeline pads, a caption's dozen words get one per cent of the attention of a model
    that does not know them yet, and it learns next to nothing of them. Once it knows them, it learns to overlook the
    padding, of any length up to those 512.
    """
    most = tokens + _SHORT if done < _SHORT_SHARE else PIPELINE_TEXT
    return round(tokens * (most / tokens) ** torch.rand(()).item())


def choose_frames(frames: int, count: int) -> Tensor:
    """Sorted places of `count` of `frames` latent frames: the first, the last, and others at random."""
    inner = 1 + torch.randperm(frames - 2)[: count - 2]
    return torch.cat([torch.tensor([0]), inner.sort().values, torch.tensor([frames - 1])])


def draw_levels(count: int, shift: float) -> Tensor:
    """Noise levels in (0, 1) `[count]`: logit-normal, shifted; some so far that they decide what goes where."""
    level = torch.sigmoid(torch.randn(count))
    shifts = torch.where(torch.rand(count) < _LAYOUT_SHARE, _LAYOUT_SHIFT, shift)
    return shifts * level / (1 + (shifts - 1) * level)


def contrast_gain(latents: Tensor, objects: Tensor) -> Tensor:
    """How much more errors weigh at the objects of each clip, `[B, 1, 1, 1, 1]`: the more, the less they stand out.

    What tells one shape from another is its outline, whose errors are as large as its contrast: without this, shapes
    are learnt on white and not on gray.

    Args:
        latents: clean clips, normalised, `[B, C, T, H, W]`.
        objects: where the object is, bool `[B, T, H, W]`.
    """
    axes, inside = (2, 3, 4), objects.unsqueeze(1)
    outside = ~inside
    backdrop = (latents * outside).sum(axes, keepdim=True) / outside.sum(axes, keepdim=True).clamp(min=1)
    distance = ((latents - backdrop).square() * inside).sum((1, *axes), keepdim=True)
    count = (latents.shape[1] * inside.sum((1, *axes), keepdim=True)).clamp(min=1)
    return (_CONTRAST * count / distance.clamp(min=1e-6)).clamp(*_GAINS)


def velocity_error(predicted: Tensor, wanted: Tensor, objects: Tensor, gain: Tensor) -> Tensor:
    """Mean squared error of velocities `[B, C, T, H, W]`, weighted where `objects` (bool `[B, T, H, W]`) are.

    `gain` is that of `contrast_gain`.
    """
    weight = 1 + (_OBJECT_WEIGHT * gain - 1) * objects.unsqueeze(1)
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
    level = draw_levels(len(captions), shift).to(latents.device)
    noise = torch.randn_like(latents)
    mix = level.view(-1, 1, 1, 1, 1)
    predicted = model(
        hidden_states=(1 - mix) * latents + mix * noise,
        timestep=level * 1000,
        encoder_hidden_states=text(captions),
        return_dict=False,
    )[0]
    return velocity_error(predicted.float(), noise - latents, objects, contrast_gain(latents, objects))


def train_transformer(
    place: Place, output: Path, recipe: Recipe, bank: Bank, seed: int = 0, start: Start | None = None
) -> None:
    """Train (or resume) the transformer and its text encoder; export now and then, and at the end.

    Args:
        place: where to run, and until when.
        output: folder of the pipeline.
        recipe: sizes and settings.
        bank: what to learn from.
        seed: of the pictures that are shown.
        start: transformer and text encoder of the recipe's sizes to begin with; weights that ask for no gradients
            stay as they are. Default: new ones.

    Raises:
        OutOfTime: the time of this call is over; the next goes on.
    """
    sizes, settings, repertoire = recipe.sizes, recipe.flow, recipe.repertoire
    tokenizer = make_tokenizer(repertoire)
    model, encoder = start or (make_transformer(sizes), make_text_encoder(sizes, tokenizer))
    model = model.to(place.device)
    text = Captioner(tokenizer, encoder, repertoire.text_tokens).to(place.device)
    both = nn.ModuleDict({"transformer": model, "text": text})
    cross = PaddedCrossAttention(repertoire.text_tokens)
    for name, attention in model.named_modules():
        if name.endswith("attn2"):
            attention.set_processor(cross)
        elif name.endswith("attn1") and place.is_half and not place.is_gpu:
            attention.set_processor(SelfAttentionInHalf())
    _, _, total, height, width = bank.latents.shape
    model.rope = rope = FrameRope(model.rope, total)
    hidden, rest = split_parameters(both, skip=ADAM_PARTS)
    probe = Probe(model, (total, height, width), repertoire=repertoire).to(place.device)
    rest += probe.parameters()
    optimizers = [
        (Muon(hidden, weight_decay=DECAY, is_stacked=place.is_gpu, is_half=place.is_half), settings.rates[0]),
        (torch.optim.AdamW(rest, betas=(0.9, 0.97), weight_decay=0.0), settings.rates[1]),
    ]
    run = TrainingRun(place, "flow", both, optimizers, settings.ema, {"probe": probe}, settings.save_every)

    def finish(step: int, done: float) -> None:
        export(place.work, output, recipe, run.average)
        if settings.shown and (done >= 1 or step % settings.show_every == 0):
            show_samples(output, place, recipe, seed, step)

    for step, done in run.steps(settings.pace, finish):
        phase = sum(done >= share for share in _PHASES)
        shares = torch.tensor([draw.shares[phase] for draw in settings.draws])
        draw = settings.draws[int(torch.multinomial(shares, 1, generator=run.kinds))]
        rows = torch.randint(len(bank.captions), (place.team.part(draw.batch),))
        rope.chosen = choose_frames(total, draw.latent_frames)
        latents, objects = bank.latents[rows][:, :, rope.chosen].float(), bank.objects[rows][:, rope.chosen]
        cross.pad_to(choose_padding(done, repertoire.text_tokens))
        captions = ["" if torch.rand(()) < DROP_CAPTION else bank.captions[i] for i in rows]
        with place.precision():
            loss = flow_loss(model, text, latents, objects, captions, sizes.flow_shift)
            placing = probe.loss(rope.chosen, captions, objects)
        run.backward(loss + settings.probe.weight(done) * placing)
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, linear_rate(step, done))
        run.log("flow", step, done, loss, f"placing {placing.item():.3f}")


def export(work: Path, output: Path, recipe: Recipe, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a pipeline folder, under a temporary name that is renamed when complete."""
    sizes, tokenizer = recipe.sizes, make_tokenizer(recipe.repertoire)
    model, encoder = make_transformer(sizes), make_text_encoder(sizes, tokenizer)
    nn.ModuleDict({"transformer": model, "text": Captioner(tokenizer, encoder)}).load_state_dict(average)
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_pipeline(fresh, load_vae(work, sizes), model, encoder, tokenizer, sizes)
    replace_parts(fresh, output)
