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
    """

    frames: int
    height: int
    width: int
    clips: int


@dataclass(frozen=True)
class Draw:
    """One kind of training step.

    Args:
        bank: index of the canvas whose clips are used.
        latent_frames: how many latent frames of each clip, from its start (the autoencoder is causal in time, so a
            prefix of the latents encodes a prefix of the clip).
        batch: clips per step.
        shares: how often a step is of this kind, in each phase of the training.
    """

    bank: int
    latent_frames: int
    batch: int
    shares: tuple[float, float, float]


CANVASES = (
    Canvas(5, 64, 64, clips=6000),
    Canvas(17, 64, 64, clips=1500),
    Canvas(33, 64, 64, clips=200),
)
# Single frames are cheap and teach what things look like; clips then teach motion; long clips come last.
DRAWS = (
    Draw(bank=0, latent_frames=1, batch=12, shares=(0.60, 0.10, 0.03)),
    Draw(bank=0, latent_frames=3, batch=5, shares=(0.40, 0.50, 0.12)),
    Draw(bank=1, latent_frames=5, batch=3, shares=(0.00, 0.30, 0.35)),
    Draw(bank=1, latent_frames=9, batch=2, shares=(0.00, 0.10, 0.30)),
    Draw(bank=2, latent_frames=17, batch=1, shares=(0.00, 0.00, 0.20)),
)


def main() -> None:
    """Run all stages that are not finished yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("work/tiny-wan"), help="folder of checkpoints and logs")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "tiny-wan", help="folder of the result")
    parser.add_argument("--vae-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4000, help="steps of the transformer")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)
    sizes = TinyWanSizes()
    vae = train_vae(arguments.work, sizes, arguments.vae_steps, arguments.seed)
    banks = [encode_bank(arguments.work, vae, canvas, arguments.seed) for canvas in CANVASES]
    train_transformer(arguments.work, arguments.output, sizes, banks, DRAWS, arguments.steps)


if __name__ == "__main__":
    main()
