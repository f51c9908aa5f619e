"""Train the small Wan pipeline from nothing: `python samples/train_tiny_wan.py --work work/tiny-wan`.

Stages: autoencoder, bank of encoded clips, transformer with its text encoder, export. A killed run resumes from the
work folder; a finished stage is not run again.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch

from dit_accel.samples.tiny_wan_flow import train_transformer
from dit_accel.samples.tiny_wan_model import TinyWanSizes
from dit_accel.samples.tiny_wan_vae import encode_bank, train_vae


@dataclass(frozen=True)
class Canvas:
    """One size of training clips.

    Args:
        frames, height, width: pixels; frames is odd.
        clips: how many are encoded into the bank.
        batch: clips per training step.
        share: how often a training step takes this size.
        late_share: the same for the last steps, which are for motion on large canvases.
    """

    frames: int
    height: int
    width: int
    clips: int
    batch: int
    share: float
    late_share: float


CANVASES = (
    Canvas(7, 40, 40, clips=6000, batch=12, share=0.80, late_share=0.45),
    Canvas(11, 56, 56, clips=800, batch=4, share=0.14, late_share=0.35),
    Canvas(21, 80, 80, clips=160, batch=1, share=0.06, late_share=0.20),
)


def main() -> None:
    """Run all stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan"), help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-wan", help="folder of the result")
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1850, help="steps of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    sizes = TinyWanSizes()
    vae = train_vae(arguments.work, sizes, arguments.vae_steps, arguments.seed)
    banks = [encode_bank(arguments.work, vae, canvas, arguments.seed) for canvas in CANVASES]
    train_transformer(arguments.work, arguments.output, sizes, banks, CANVASES, arguments.steps)


if __name__ == "__main__":
    main()
