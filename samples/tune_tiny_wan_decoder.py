"""Tune the decoder of a finished small model on whole clips: `python samples/tune_tiny_wan_decoder.py --model FOLDER`.

Latents keep their meaning, so that the other parts of the pipeline stay as they are. A killed run resumes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import AutoTokenizer

from dit_accel.models import check_model
from dit_accel.samples.repertoire import repertoire_of
from dit_accel.samples.tiny_wan_model import save_part
from dit_accel.samples.tiny_wan_recipes import SMALL, WHOLE_CLIPS, Pace
from dit_accel.samples.tiny_wan_run import OutOfTime
from dit_accel.samples.tiny_wan_vae import reconstruction_psnr, tune_decoder
from dit_accel.samples.train_tiny_wan import UNFINISHED, add_place, read_place


def main(given: Sequence[str] | None = None) -> None:
    """Tune, measure before and after, and write the autoencoder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="samples/tiny-wan", help="pipeline folder")
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan-decoder"), help="folder of the checkpoint")
    parser.add_argument("--output", type=Path, default=None, help="folder of the autoencoder. Default: in the model's")
    parser.add_argument("--steps", type=int, default=None, help="instead of the recipe's")
    add_place(parser)
    arguments = parser.parse_args(given)
    model = Path(check_model(arguments.model))
    vae = AutoencoderKLWan.from_pretrained(model / "vae", dtype=torch.float32).to(arguments.device).eval()
    repertoire = repertoire_of(AutoTokenizer.from_pretrained(model / "tokenizer"))
    tuning = WHOLE_CLIPS
    if arguments.steps is not None:
        tuning = replace(tuning, pace=Pace(arguments.steps))
    recipe = replace(SMALL, repertoire=repertoire, vae=replace(SMALL.vae, tuning=tuning))
    before = reconstruction_psnr(vae, repertoire=repertoire)
    try:
        read_place(arguments, recipe).together(tune_decoder, vae, recipe, arguments.seed)
    except OutOfTime as error:
        print(f"time is over: {error}", flush=True)
        sys.exit(UNFINISHED)
    print(f"held-out PSNR {before:.2f} dB before, {reconstruction_psnr(vae, repertoire=repertoire):.2f} dB after")
    output = arguments.output or model / "vae"
    fresh = output.with_name(output.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    save_part(vae, fresh)
    shutil.rmtree(output, ignore_errors=True)
    fresh.rename(output)


if __name__ == "__main__":
    main()
