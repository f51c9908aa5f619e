"""Measure how the small model follows prompts: `python samples/evaluate_tiny_wan.py --num-prompts 16`.

Prompts are combinations that were held out of training. OpenCV finds the objects in each clip, and they are compared
with what the caption says. Two more rows say what the judge makes of clips that were drawn as the prompts say, before
and after the model's autoencoder: no model can be found better than these. `--save-clips` keeps what was made, and
`--clips` judges it without generating, so that one machine may generate and another may judge.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dit_accel
from dit_accel.generation import call_pipeline
from dit_accel.models import load_pipeline
from dit_accel.presets import Preset
from dit_accel.report.records import environment
from dit_accel.samples.cheap_attention import dense_in_half
from dit_accel.samples.held_out import Task, Verdict, criteria, held_out_tasks
from dit_accel.samples.repertoire import REPERTOIRES, Repertoire, repertoire_of, to_frames, to_pixels
from dit_accel.samples.scenes.draw import Canvas


def generate(
    pipe: Any, preset: Preset, tasks: Sequence[Task], seed: int, half: Repertoire | None = None
) -> list[np.ndarray]:
    """What the pipeline makes of each prompt, uint8 `[T, H, W, 3]`.

    Args:
        pipe: a Wan pipeline.
        preset: how.
        tasks: the prompts.
        seed: of the first clip's noise.
        half: what the model knows, to run it dense in bfloat16 instead. Default None: as the preset says.
    """
    made = []
    cheap = dense_in_half(pipe.transformer, half.text_tokens) if half else dit_accel.accelerate(pipe, preset)
    with cheap:
        for number, task in enumerate(tasks):
            frames, _ = call_pipeline(pipe, preset.generation, task.text, seed + number)
            made.append(np.round(frames * 255).astype(np.uint8))
            print(task.text, task.judge(made[-1]), flush=True)
    return made


@torch.no_grad()
def through_autoencoder(vae: Any, clip: np.ndarray) -> np.ndarray:
    """A clip (uint8 `[T, H, W, 3]`) encoded and decoded."""
    pixels = to_pixels([clip]).to(vae.device, vae.dtype)
    return to_frames(vae.decode(vae.encode(pixels).latent_dist.mean).sample[0])


def table(rows: dict[str, list[Verdict]], names: Sequence[str]) -> list[str]:
    """Lines of Markdown: for each row the share of verdicts that are right, of those that there are.

    Args:
        rows: verdicts by what was judged.
        names: criteria.
    """
    lines = [["clips", "prompts", *names], ["---"] * (2 + len(names))]
    for what, verdicts in rows.items():
        judged = [[v[name] for v in verdicts if v[name] is not None] for name in names]
        shares = [f"{sum(map(bool, found)) / len(found):.0%}" if found else "" for found in judged]
        lines.append([what, str(len(verdicts)), *shares])
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def read_options(given: Sequence[str] | None) -> tuple[argparse.Namespace, Preset]:
    """Options of the command, and the preset with the steps that they ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan/dense")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--repertoire", choices=REPERTOIRES, help="of the prompts; default: all that the model knows")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps instead of the preset's")
    parser.add_argument("--half", action="store_true", help="dense, in bfloat16: faster on CPUs that multiply it fast")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-clips", type=Path, default=None, help="keep what was made, as .npz")
    parser.add_argument("--clips", type=Path, default=None, help="judge these instead of generating")
    parser.add_argument("--output", type=Path, default=None, help="write the verdicts as JSON")
    arguments = parser.parse_args(given)
    preset = dit_accel.load_preset(arguments.preset)
    if arguments.half and (preset.method.name != "dense" or arguments.device not in ("auto", "cpu")):
        parser.error(f"--half: expected a dense preset and a CPU, got {preset.name} and device {arguments.device}")
    arguments.device = "cpu" if arguments.half else arguments.device
    if arguments.steps is not None:
        generation = preset.generation.model_copy(update={"num_inference_steps": arguments.steps})
        preset = preset.model_copy(update={"generation": generation})
    return arguments, preset


def main(given: Sequence[str] | None = None) -> None:
    """Generate, judge and print one table."""
    arguments, preset = read_options(given)
    generation = preset.generation
    pipe = load_pipeline(arguments.model or preset.repository, arguments.device)
    known = repertoire_of(pipe.tokenizer)
    repertoire = REPERTOIRES[arguments.repertoire] if arguments.repertoire else known
    canvas = Canvas(generation.num_frames, generation.height, generation.width)
    tasks = held_out_tasks(repertoire, arguments.num_prompts, canvas, arguments.seed + 99)
    if arguments.clips is None:
        made = generate(pipe, preset, tasks, arguments.seed, known if arguments.half else None)
    else:
        made = list(np.load(arguments.clips, allow_pickle=False)["clips"])[: len(tasks)]
    if arguments.save_clips is not None:
        np.savez_compressed(arguments.save_clips, clips=np.stack(made))
    truths = [task.truth() for task in tasks]
    shown = {
        "generated": made,
        "drawn": truths,
        "drawn, through the autoencoder": [through_autoencoder(pipe.vae, clip) for clip in truths],
    }
    rows = {what: [t.judge(c) for t, c in zip(tasks, clips, strict=True)] for what, clips in shown.items()}
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    print(f"preset {preset.name}{', in bfloat16' if arguments.half else ''}, {generation}")
    print("\n".join(table(rows, criteria(repertoire))))
    if arguments.output is not None:
        found = [{"prompt": task.text, **verdict} for task, verdict in zip(tasks, rows["generated"], strict=True)]
        arguments.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
