"""Does a calibrated preset beat uniform ones at equal time? `python samples/calibrate_tiny_wan.py --density 0.3`.

Calibrates the small model on captions it was trained on, then compares the result with every candidate alone on
held-out captions, from the same seeds, interleaved. The verdict stands under the table.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from dit_accel.bench.table import stamp, stream_csv
from dit_accel.calibrate.run import DEFAULT_CANDIDATES, Plan, assign, measure
from dit_accel.calibrate.tasks import calibration_prompts
from dit_accel.calibrate.write import write_preset
from dit_accel.compare.candidates import CEILING, DENSE, all_candidates, parse_candidate
from dit_accel.compare.runner import run_all
from dit_accel.compare.tables import Line, plot_pareto, summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.models import load_pipeline
from dit_accel.presets import load_preset


def verdict(lines: list[Line], name: str) -> str:
    """Whether any uniform candidate is at least as fast as `name` and closer, in one sentence."""
    mine = next(line for line in lines if line.candidate == name)
    others = [line for line in lines if line.candidate not in (name, DENSE, CEILING)]
    better = [line.candidate for line in others if line.ratio >= mine.ratio and line.psnr >= mine.psnr]
    worse = [line.candidate for line in others if line.ratio <= mine.ratio and line.psnr <= mine.psnr]
    told = (
        f"calibrated: {mine.ratio:.2f}x at {mine.psnr:.1f} dB; no slower and closer than {', '.join(worse) or 'none'}"
    )
    return told + (f"; beaten by {', '.join(better)}" if better else "; beaten by none")


def main() -> None:
    """Calibrate, compare, and write tables and the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.3)
    parser.add_argument("--preset", default="tiny-wan/composed")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--candidates", nargs="+", default=[c for c in DEFAULT_CANDIDATES if c != "dense"])
    parser.add_argument("--calibration-prompts", type=int, default=2)
    parser.add_argument("--num-prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps instead of the preset's")
    parser.add_argument("--output", type=Path, default=Path("outputs/calibration"))
    arguments = parser.parse_args()
    base = load_preset(arguments.preset)
    generation = base.generation
    if arguments.steps is not None:
        generation = generation.model_copy(update={"num_inference_steps": arguments.steps})
    pipe = load_pipeline(arguments.model or base.repository)
    uniform = {text: parse_candidate(text, base) for text in arguments.candidates}
    methods = {text: candidate.method for text, candidate in uniform.items()}
    plan = Plan(base, methods, calibration_prompts(base, [], arguments.calibration_prompts, 1000), generation, 1000)
    held = measure(pipe, plan, arguments.output / "calibrated.safetensors", lambda line: print(line, file=sys.stderr))
    found = assign(held, max_density=arguments.density)
    path = arguments.output / "calibrated.yaml"
    write_preset(path, plan, found, held)
    candidates = all_candidates(arguments.candidates, base)
    candidates.append(replace(parse_candidate(str(path), base), label="calibrated"))
    tasks, criteria = make_tasks(base, [], arguments.num_prompts, seed=0)
    common = {**stamp(), "command": " ".join(sys.argv)}
    made = (row for _, rows in run_all(pipe, generation, tasks, candidates, arguments.rounds) for row in rows)
    lines = summarise(list(stream_csv(arguments.output / "compare.csv", made, common)), criteria)
    head = {**common, "prompts": len(tasks), "predicted error": f"{found.error:.4f}", "density": f"{found.cost:.3f}"}
    text = to_markdown(lines, head) + "\n" + verdict(lines, "calibrated") + "\n"
    (arguments.output / "compare.md").write_text(text, encoding="utf-8")
    plot_pareto(lines, arguments.output / "pareto.png")
    print(text)


if __name__ == "__main__":
    main()
