"""Fine-tune the small model for streams: `python samples/train_tiny_wan_causal.py --work work/tiny-wan-causal`.

The finished bidirectional model learns to make a clip chunk by chunk, as its preset streams. Clips are longer than
those it was made with, and the object bounces off the edges, so that a stream may go on for ever. Text encoder and
autoencoder stay as they are. A killed run resumes from the work folder.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from diffusers import WanPipeline
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.models import check_model
from dit_accel.presets import load_preset
from dit_accel.samples.muon import Muon, split_parameters
from dit_accel.samples.tiny_wan_causal import CausalTeacher, Excerpt, draw_excerpt
from dit_accel.samples.tiny_wan_flow import (
    ADAM_PARTS,
    DECAY,
    DROP_CAPTION,
    Captioner,
    PaddedCrossAttention,
    choose_padding,
)
from dit_accel.samples.tiny_wan_run import TrainingRun, replace_parts
from dit_accel.samples.tiny_wan_vae import Bank, encode_bank
from dit_accel.samples.train_tiny_wan import Canvas
from dit_accel.streaming import StreamSettings

CANVAS = Canvas(65, 64, 64, clips=600, bounces=True)
RATES = (0.005, 5e-4)  # of Muon and of AdamW: a quarter of those the model was made with
_EMA = 0.99


def excerpts(settings: StreamSettings, frames: int, window: int = 4) -> list[list[Excerpt]]:
    """From the start of a clip of `frames` latent frames, and from every later chunk; `window` chunks each."""
    last = frames // settings.chunk - 1
    begin = [Excerpt.of(settings, 1, min(window - 1, last))]
    return [begin, [Excerpt.of(settings, first, first + window - 1) for first in range(2, last - window + 2)]]


def train_causal(
    work: Path, output: Path, start: str, bank: Bank, settings: StreamSettings, steps: int, save_every: int = 100
) -> None:
    """Train (or resume) the transformer of the pipeline folder `start`; export now and then, and at the end.

    Args:
        work: folder of the checkpoint.
        output: pipeline folder to write.
        start: pipeline folder or `samples/...` of the bidirectional model.
        bank: encoded clips.
        settings: the stream that is trained for.
        steps: of one clip each.
        save_every: steps between exports. Default 100.
    """
    pipe = WanPipeline.from_pretrained(check_model(start), dtype=torch.float32)
    model, text = pipe.transformer, Captioner(pipe.tokenizer, pipe.text_encoder)
    stock, cross = model.attn_processors, PaddedCrossAttention()
    model.set_attn_processor({name: cross if "attn2" in name else p for name, p in stock.items()})
    height, width = bank.latents.shape[-2:]
    teacher = CausalTeacher(model, (height, width), pipe.scheduler.config.shift)
    hidden, rest = split_parameters(model, skip=ADAM_PARTS)
    optimizers = [
        (Muon(hidden, weight_decay=DECAY), RATES[0]),
        (torch.optim.AdamW(rest, betas=(0.9, 0.97), weight_decay=0.0), RATES[1]),
    ]
    run = TrainingRun(work / "causal_checkpoint.pt", model, optimizers, _EMA, save_every=save_every)
    kinds = [kind for kind in excerpts(settings, bank.latents.shape[2]) if kind]
    for step in range(run.first, steps):
        row = torch.randint(len(bank.captions), (1,))
        caption = "" if torch.rand(()) < DROP_CAPTION else bank.captions[int(row)]
        cross.pad_to(choose_padding(1.0))  # the words are known by now
        with torch.no_grad():
            words = text([caption])
        loss = teacher.loss(draw_excerpt(kinds), bank.latents[row].float(), bank.objects[row], words)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rest, 1.0)
        run.update(step, steps)
        run.log("causal", step, steps, loss)
        if run.is_due(step, steps):
            run.save(step)
            export(output, Path(check_model(start)), run.average)


def export(output: Path, start: Path, average: dict[str, Tensor]) -> None:
    """Write the averaged weights as a pipeline folder whose other parts are copies of those of `start`."""
    pipe = WanPipeline.from_pretrained(start)
    pipe.transformer.load_state_dict(average)
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    pipe.transformer.half().save_pretrained(fresh / "transformer")
    for part in (name for name in pipe.components if (start / name).is_dir() and name != "transformer"):
        shutil.copytree(start / part, fresh / part)
    shutil.copy(start / "model_index.json", fresh)
    replace_parts(fresh, output)


def main() -> None:
    """Encode the clips and train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan-causal"), help="folder of checkpoints")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "tiny-wan-causal", help="folder of the result"
    )
    parser.add_argument("--start", default="samples/tiny-wan", help="pipeline folder of the bidirectional model")
    parser.add_argument("--preset", default="tiny-wan-causal", help="preset whose stream is trained for")
    parser.add_argument("--clips", type=int, default=CANVAS.clips)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    canvas = Canvas(CANVAS.frames, CANVAS.height, CANVAS.width, arguments.clips, CANVAS.bounces)
    vae = WanPipeline.from_pretrained(check_model(arguments.start), dtype=torch.float32).vae.eval()
    bank = encode_bank(arguments.work, vae, canvas, arguments.seed)
    settings = load_preset(arguments.preset).stream
    if settings is None:
        raise ConfigError(f"preset {arguments.preset}", "says nothing of streams; give one with a `stream` section")
    train_causal(arguments.work, arguments.output, arguments.start, bank, settings, arguments.steps)


if __name__ == "__main__":
    main()
