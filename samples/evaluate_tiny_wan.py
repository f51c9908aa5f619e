"""Measure how the small model follows prompts: `python samples/evaluate_tiny_wan.py --num-prompts 16`.

Prompts are combinations that were held out of training. OpenCV finds the object in each frame and compares it with
what the caption says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np

import dit_accel
from dit_accel.generation import call_pipeline
from dit_accel.models import load_pipeline
from dit_accel.report import environment
from dit_accel.samples.clips import BACKGROUNDS, COLORS, DIRECTIONS, SHAPES, Scene, caption, draw_scene, render

_MARGIN = 40  # a pixel belongs to the object when some channel is this far from the background
CRITERIA = ("color", "shape", "direction", "background")


def find_object(frame: np.ndarray, background: np.ndarray) -> np.ndarray:
    """Bool mask `[H, W]` of the largest connected region that differs from the background colour."""
    differs = (np.abs(frame.astype(int) - background).max(-1) > _MARGIN).astype(np.uint8)
    count, labels, stats, _ = cv2.connectedComponentsWithStats(differs)
    if count < 2:
        return np.zeros(frame.shape[:2], dtype=bool)
    return np.asarray(labels == 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax()))


def nearest(color: np.ndarray, table: dict[str, tuple[int, int, int]]) -> str:
    """Name of the closest colour of a table."""
    return min(table, key=lambda name: float(np.linalg.norm(color - np.array(table[name]))))


def likeliest_shape(mask: np.ndarray) -> str:
    """Shape whose outline of the same area overlaps the mask best."""
    if not mask.any():
        return "none"
    size = 64
    found = _centered(mask, size)

    def overlap(name: str) -> float:
        scene = Scene("red", name, "right", "black", 20.0, 0.0, (0.5, 0.5))
        drawn = _centered(render(scene, 1, 96, 96)[0].max(-1) > 100, size)
        return float((found & drawn).sum() / (found | drawn).sum())

    return max(SHAPES, key=overlap)


def _centered(mask: np.ndarray, size: int) -> np.ndarray:
    """The mask scaled to a common area around its centroid, bool `[size, size]`."""
    rows, columns = np.nonzero(mask)
    scale = size * 0.4 / np.sqrt(len(rows))
    shift = size / 2 - scale * np.array([columns.mean(), rows.mean()])
    matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
    return np.asarray(cv2.warpAffine(mask.astype(np.float32), matrix, (size, size)) > 0.5)


def describe(clip: np.ndarray) -> dict[str, str]:
    """What a clip (uint8 `[T, H, W, 3]`) shows, by criterion; "none" where no object is found in two frames."""
    border = np.concatenate([clip[:, 0], clip[:, -1], clip[:, :, 0], clip[:, :, -1]], axis=1).reshape(-1, 3)
    background = np.median(border, axis=0)
    masks = [find_object(frame, background) for frame in clip]
    seen = [i for i, mask in enumerate(masks) if mask.sum() >= 20]
    found = dict.fromkeys(CRITERIA, "none") | {"background": nearest(background, BACKGROUNDS)}
    if len(seen) < 2:
        return found
    middle = seen[len(seen) // 2]
    inside = cv2.erode(masks[middle].astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    inside = inside if inside.any() else masks[middle]
    found["color"] = nearest(np.median(clip[middle][inside], axis=0), COLORS)
    found["shape"] = likeliest_shape(masks[middle])
    first, last = (np.argwhere(masks[i]).mean(0)[::-1] for i in (seen[0], seen[-1]))
    found["direction"] = _direction(last - first)
    return found


def judge(clip: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Which criteria a clip (uint8 `[T, H, W, 3]`) meets."""
    return {name: found == getattr(scene, name) for name, found in describe(clip).items()}


def _direction(path: np.ndarray) -> str:
    """Direction of the table closest in angle to a path (x, y) in pixels."""
    if np.linalg.norm(path) < 3:
        return "none"
    unit = {name: np.array(way) / np.linalg.norm(way) for name, (way, _) in DIRECTIONS.items()}
    return max(unit, key=lambda name: float(unit[name] @ path))


def main() -> None:
    """Generate, judge and print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny-wan/dense")
    parser.add_argument("--model", default=None, help="pipeline folder instead of the preset's")
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--steps", type=int, default=None, help="denoising steps instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=None, help="write the verdicts as JSON")
    arguments = parser.parse_args()
    preset = dit_accel.load_preset(arguments.preset)
    generation = preset.generation
    if arguments.steps is not None:
        generation = generation.model_copy(update={"num_inference_steps": arguments.steps})
    pipe = load_pipeline(arguments.model or preset.repository)
    rng = np.random.default_rng(arguments.seed + 99)
    results: list[dict[str, bool]] = []
    texts: list[str] = []
    with dit_accel.accelerate(pipe, preset):
        for number in range(arguments.num_prompts):
            scene = draw_scene(rng, held_out=True)
            text = caption(scene, rng)
            frames, _ = call_pipeline(pipe, generation, text, arguments.seed + number)
            verdict = judge(np.round(frames * 255).astype(np.uint8), scene)
            results.append(verdict)
            texts.append(text)
            print(text, {name: verdict[name] for name in CRITERIA}, flush=True)
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    print(f"preset {preset.name}, {generation}")
    print("| prompts | " + " | ".join(CRITERIA) + " |\n|---|" + "---|" * len(CRITERIA))
    shares = [f"{sum(r[name] for r in results) / len(results):.0%}" for name in CRITERIA]
    print(f"| {len(results)} | " + " | ".join(shares) + " |")
    if arguments.output is not None:
        rows = [{"prompt": text, **verdict} for text, verdict in zip(texts, results, strict=True)]
        arguments.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
