"""The page's first tab: one prompt, dense and accelerated side by side."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import numpy as np

from dit_accel.errors import DitAccelError
from dit_accel.models import fit_to_model
from dit_accel.pipelines.demo.jobs import Cancelled, Clip, Step, Studio
from dit_accel.pipelines.demo.views import comparison, report_page, report_table
from dit_accel.presets import load_preset

Outputs = tuple[Any, ...]


def generate_tab(studio: Studio, example: str, report: gr.HTML) -> None:
    """Lay out the tab and connect it.

    Args:
        studio: what runs the jobs.
        example: prompt that stands there at first.
        report: where the report of the accelerated run goes.
    """
    default = studio.preset.generation
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox(example, label="Prompt", elem_id="prompt", max_length=2000)
            choices = [name for name in studio.presets() if not name.endswith("/dense")]
            preset = gr.Dropdown(choices, value=studio.preset.name, label="Preset", elem_id="preset")
            with gr.Row():
                height = gr.Number(default.height, label="Height", precision=0, min_width=80, elem_id="height")
                width = gr.Number(default.width, label="Width", precision=0, min_width=80, elem_id="width")
                frames = gr.Number(default.num_frames, label="Frames", precision=0, min_width=80, elem_id="frames")
            with gr.Row():
                steps = gr.Number(
                    default.num_inference_steps, label="Steps", precision=0, min_width=80, elem_id="steps"
                )
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, elem_id="seed")
            dense = gr.Checkbox(True, label="Compare with dense", elem_id="dense")
            with gr.Row():
                start = gr.Button("Generate", variant="primary", elem_id="start")
                stop = gr.Button("Cancel", variant="stop", elem_id="cancel")
        with gr.Column(scale=2, min_width=280):
            status = gr.Markdown("Ready.", elem_id="status")
            image = gr.Image(label="Now", interactive=False, height=200, elem_id="preview", buttons=[])
            with gr.Row():
                left = gr.Video(label="Dense", autoplay=True, loop=True, elem_id="video-dense", interactive=False)
                right = gr.Video(label="Accelerated", autoplay=True, loop=True, elem_id="video-fast", interactive=False)
                difference = gr.Video(
                    label="Difference x 4", autoplay=True, loop=True, elem_id="video-difference", interactive=False
                )
            table = gr.Markdown(elem_id="figures")
    outputs = [status, image, left, right, difference, table, report]

    def sizes(name: str) -> tuple[int, int, int, int]:
        return sizes_of(name, studio.model)

    def generate(*values: Any) -> Iterator[Outputs]:
        yield from _generate(studio, *values)

    inputs = [prompt, preset, height, width, frames, steps, seed, dense]
    gr.on(
        [start.click, prompt.submit],
        generate,
        inputs,
        outputs,
        concurrency_id="job",
        concurrency_limit=1,
        api_name=False,
        show_progress="hidden",
    )
    # Presets of one model differ in size and steps; what was typed for another would be taken for the new one's own.
    preset.change(sizes, preset, [height, width, frames, steps], queue=False, api_name=False)
    # Not queued behind the job that it stops.
    stop.click(lambda: cancel(studio), None, None, queue=False, api_name=False)


def cancel(studio: Studio) -> None:
    """Stop the running job, and say so in a note: the status line is the job's own."""
    gr.Info("Stopping after this step." if studio.cancel() else "Nothing is running.")


def sizes_of(preset: str, model: str | None = None) -> tuple[int, int, int, int]:
    """Height, width, frames and steps that a preset generates with; `model` as `Studio` got it."""
    made = fit_to_model(load_preset(preset), model).generation
    return made.height, made.width, made.num_frames, made.num_inference_steps


def _generate(
    studio: Studio,
    prompt: str,
    preset: str,
    height: float,
    width: float,
    frames: float,
    steps: float,
    seed: float,
    with_dense: bool,
) -> Iterator[Outputs]:
    """Run the job and yield the page's outputs as it goes: status, preview, three videos, figures, report."""
    empty: list[Any] = [None] * 6 + ["Nothing was generated yet."]
    try:
        if not prompt.strip():
            raise ValueError("The prompt is empty.")
        chosen = load_preset(preset)
        sizes = {"height": height, "width": width, "num_frames": frames, "num_inference_steps": steps}
        generation = studio.generation(chosen, **{name: whole_number(name, value) for name, value in sizes.items()})
        runs = {"accelerated": chosen}
        if with_dense:
            runs = {"dense": load_preset(f"{chosen.name.split('/')[0]}/dense"), **runs}
        yield ("Loading the model.", *empty[1:])
        clips: list[Clip] = []
        view = list(empty)
        for event in studio.run(runs, generation, prompt, whole_number("seed", seed)):
            if isinstance(event, Step):
                view[0] = f"{event.run}: step {event.number} of {event.total}, {event.seconds:.2f} s per step"
                view[1] = event.preview
            else:
                clips.append(event)
                view[2 if event.run == "dense" else 3] = str(event.path)
                view[0] = f"{event.run}: done in {event.total:.1f} s"
            yield tuple(view)
        view[4], view[5] = _finish(studio, clips, generation.fps)
        view[6] = report_page(clips[-1])
        yield tuple(view)
    except Cancelled:
        yield ("Cancelled.", *empty[1:])
    except (DitAccelError, ValueError, RuntimeError) as error:
        yield (f"**Error:** {' '.join(str(error).split())}", *empty[1:])


def whole_number(name: str, value: float | None) -> int:
    """A number of the page as an integer; ValueError for anything else."""
    if value is None or not np.isfinite(value) or value != int(value):
        raise ValueError(f"{name}: expected a whole number, got {value}")
    return int(value)


def _finish(studio: Studio, clips: list[Clip], fps: int) -> tuple[str | None, str]:
    """Path of the difference video (None for a single run) and the table of figures."""
    if len(clips) == 1:
        return None, report_table(clips[0])
    dense, fast = clips
    path, figures = comparison(dense, fast, studio.output_dir, fps)
    return str(path), figures + "\n\n" + report_table(fast)
