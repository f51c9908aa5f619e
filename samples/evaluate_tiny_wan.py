"""Measure how the small model follows prompts: `python samples/evaluate_tiny_wan.py --num-prompts 16`.

Prompts are combinations that were held out of training. OpenCV finds the objects in each clip, and they are compared
with what the caption says. Two more rows say what the judge makes of clips that were drawn as the prompts say, before
and after the model's autoencoder: no model can be found better than these. `--clips` names a folder where clips are
kept: one that is there is not made again, so that a run may be killed, and one machine may make what another judges.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

import dit_accel
from dit_accel.generation import call_pipeline
from dit_accel.models import check_model, load_pipeline
from dit_accel.presets import Preset
from dit_accel.report.records import environment
from dit_accel.samples.cheap_attention import dense_in_half
from dit_accel.samples.clip_folder import ClipFolder, weights_digest
from dit_accel.samples.held_out import Task, Verdict, criteria, held_out_tasks
from dit_accel.samples.repertoire import REPERTOIRES, Repertoire, repertoire_of, to_frames, to_pixels
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.team import Team, run_team


@dataclass(frozen=True)
class Options:
    """What is measured.

    Args:
        preset: how clips are made, with the steps that were asked for.
        model: pipeline folder or repository.
        device: where.
        repertoire: of the prompts.
        num_prompts: how many.
        half: whether dense attention and the transformer run in bfloat16, instead of as the preset says.
        seed: of the prompts, and of the first clip's noise.
    """

    preset: Preset
    model: str
    device: str
    repertoire: Repertoire
    num_prompts: int
    half: bool
    seed: int

    def label(self) -> dict[str, Any]:
        """What clips must share to stand in one table."""
        how = self.preset.model_dump(mode="json", include={"method", "schedule", "generation"})
        kept = {"repertoire": self.repertoire.name, "seed": self.seed, "half": self.half}
        return {"weights": weights_digest(self.model), **how, **kept}


def held_out(options: Options) -> list[Task]:
    """The prompts, and who judges them."""
    size = options.preset.generation
    canvas = Canvas(size.num_frames, size.height, size.width)
    return held_out_tasks(options.repertoire, options.num_prompts, canvas, options.seed + 99)


def generate(team: Team, options: Options, kept: ClipFolder) -> None:
    """Make the clips that are missing, this process every so many-th of them."""
    tasks, preset = held_out(options), options.preset
    missing = [number for number in range(team.rank, len(tasks), team.size) if not kept.has(number)]
    if missing:
        pipe = load_pipeline(options.model, options.device)
        known = repertoire_of(pipe.tokenizer).text_tokens
        with dense_in_half(pipe.transformer, known) if options.half else dit_accel.accelerate(pipe, preset):
            for number in missing:
                frames, _ = call_pipeline(pipe, preset.generation, tasks[number].text, options.seed + number)
                clip = np.round(frames * 255).astype(np.uint8)
                kept.keep(number, clip)
                print(number, tasks[number].text, tasks[number].judge(clip), flush=True)
    team.wait()


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


def read_options(given: Sequence[str] | None) -> tuple[argparse.Namespace, Options]:
    """Options of the command, and what they ask to measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan/dense")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--repertoire", choices=REPERTOIRES, help="of the prompts; default: all that the model knows")
    parser.add_argument("--steps", type=int, default=None, help="denoising steps instead of the preset's")
    parser.add_argument("--half", action="store_true", help="dense, in bfloat16: faster on CPUs that multiply it fast")
    parser.add_argument("--processes", type=int, default=1, help="that make clips at once, on a CPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clips", type=Path, default=None, help="folder where clips are kept; default: nowhere")
    parser.add_argument("--output", type=Path, default=None, help="write the verdicts as JSON")
    arguments = parser.parse_args(given)
    preset = dit_accel.load_preset(arguments.preset)
    on_cpu = arguments.device in ("auto", "cpu")
    if arguments.half and (preset.method.name != "dense" or not on_cpu):
        parser.error(f"--half: expected a dense preset and a CPU, got {preset.name} and device {arguments.device}")
    if arguments.processes < 1 or (arguments.processes > 1 and not on_cpu):
        parser.error(f"--processes: expected 1, or more on a CPU, got {arguments.processes} on {arguments.device}")
    if arguments.steps is not None:
        generation = preset.generation.model_copy(update={"num_inference_steps": arguments.steps})
        preset = preset.model_copy(update={"generation": generation})
    model = arguments.model or preset.repository
    known = repertoire_of(AutoTokenizer.from_pretrained(check_model(model), subfolder="tokenizer"))
    repertoire = REPERTOIRES[arguments.repertoire] if arguments.repertoire else known
    device = "cpu" if arguments.half or arguments.processes > 1 else arguments.device
    return arguments, Options(preset, model, device, repertoire, arguments.num_prompts, arguments.half, arguments.seed)


def main(given: Sequence[str] | None = None) -> None:
    """Generate, judge and print one table."""
    arguments, options = read_options(given)
    tasks = held_out(options)
    with TemporaryDirectory() as nowhere:
        kept = ClipFolder(arguments.clips or Path(nowhere), options.label())
        run_team(arguments.processes, partial(generate, options=options, kept=kept))
        made = [kept.read(number) for number in range(len(tasks))]
    vae = load_pipeline(options.model, options.device).vae
    truths = [task.truth() for task in tasks]
    shown = {
        "generated": made,
        "drawn": truths,
        "drawn, through the autoencoder": [through_autoencoder(vae, clip) for clip in truths],
    }
    rows = {what: [t.judge(c) for t, c in zip(tasks, clips, strict=True)] for what, clips in shown.items()}
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    print(f"preset {options.preset.name}{', in bfloat16' if options.half else ''}, {options.preset.generation}")
    print("\n".join(table(rows, criteria(options.repertoire))))
    if arguments.output is not None:
        found = [{"prompt": task.text, **verdict} for task, verdict in zip(tasks, rows["generated"], strict=True)]
        arguments.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
