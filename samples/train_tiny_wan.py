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
    """Size and number of the training clips.

    Args:
        frames, height, width: pixels; frames is odd.
        clips: how many are encoded into the bank.
        bounces: whether the edges throw the object back, see `clips.render`. Default: its path ends before them.
    """

    frames: int
    height: int
    width: int
    clips: int
    bounces: bool = False


@dataclass(frozen=True)
class Draw:
    """One kind of training step.

    Args:
        latent_frames: how many latent frames of each clip, at their true places in time: the first, the last, and
            others at random. Few frames of a whole clip teach its motion at a fraction of its tokens; the ends are
            always there because rotary positions are relative and nothing else would say when a frame is.
        batch: clips per step.
        shares: how often a step is of this kind, in each phase of the training.
    """

    latent_frames: int
    batch: int
    shares: tuple[float, float, float]


CANVAS = Canvas(33, 64, 64, clips=1600)
DRAWS = (
    Draw(latent_frames=2, batch=9, shares=(0.50, 0.25, 0.10)),
    Draw(latent_frames=3, batch=6, shares=(0.40, 0.25, 0.20)),
    Draw(latent_frames=5, batch=3, shares=(0.10, 0.20, 0.20)),
    Draw(latent_frames=9, batch=2, shares=(0.00, 0.20, 0.25)),
    Draw(latent_frames=17, batch=1, shares=(0.00, 0.10, 0.25)),
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
    bank = encode_bank(arguments.work, vae, CANVAS, arguments.seed)
    train_transformer(arguments.work, arguments.output, sizes, bank, DRAWS, arguments.steps)


if __name__ == "__main__":
    main()
