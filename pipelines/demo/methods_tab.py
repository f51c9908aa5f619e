"""The page's tab of methods: what each computes, on any grid and at any density."""

from __future__ import annotations

import inspect
import io
from math import prod

import gradio as gr
import numpy as np
from PIL import Image

from dit_accel.errors import ConfigError, DitAccelError
from dit_accel.estimate import token_grid
from dit_accel.layout import TokenLayout, parse_grid
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.pictures import draw, picture_of
from dit_accel.pipelines.demo.jobs import Studio

LARGEST_GRID = 60_000
"""Tokens of the largest grid that the page draws; the command line has no limit."""


def methods_tab(studio: Studio) -> None:
    """Lay out the tab and connect it; the grid is at first that of the loaded preset."""
    generation = studio.preset.generation
    grid = "x".join(str(size) for size in token_grid(studio.preset.model, generation))
    names = [name for name in list_methods() if name != "dense"]
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            name = gr.Dropdown(names, value="radial", label="Method", elem_id="method")
            shape = gr.Textbox(grid, label="Grid: frames x height x width in tokens", elem_id="grid", max_length=40)
            density = gr.Slider(0.05, 1.0, value=0.25, step=0.05, label="Density", elem_id="density")
            show = gr.Button("Draw", variant="primary", elem_id="draw")
            about = gr.Markdown(_describe("radial"), elem_id="method-about")
        with gr.Column(scale=2, min_width=280):
            told = gr.Markdown("", elem_id="method-told")
            image = gr.Image(show_label=False, interactive=False, elem_id="method-image", buttons=[])
    name.change(_describe, name, about, api_name=False)
    gr.on([show.click, shape.submit], _draw, [name, shape, density], [told, image], api_name=False)


def _describe(name: str) -> str:
    cls = method_class(name)
    return f"{_with_bullets(inspect.cleandoc(cls.__doc__ or ''))}\n\nSource: {cls.source}"


def _with_bullets(text: str) -> str:
    """A docstring as Markdown: one bullet per argument, of which continued lines are a part."""
    before, _, arguments = text.partition("\nArgs:\n")
    bullets: list[str] = []
    for line in arguments.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            name, colon, said = line.strip().partition(":")
            bullets.append(f"- `{name}`{colon}{said}" if colon else f"- {name}")
        elif line.strip() and bullets:
            bullets[-1] += f" {line.strip()}"
    return before + "\n\n" + "\n".join(bullets)


def _draw(name: str, shape: str, density: float) -> tuple[str, np.ndarray | None]:
    try:
        grid = parse_grid(shape)
        if prod(grid) > LARGEST_GRID:
            raise ConfigError("grid", f"expected at most {LARGEST_GRID} tokens on this page, got {prod(grid)}")
        takes = "density" in method_class(name).parameters()
        picture = picture_of(get_method(name, **({"density": float(density)} if takes else {})), TokenLayout(grid))
    except DitAccelError as error:
        return f"**Error:** {error}", None
    shares = ", ".join(f"{share:.3f}" for share in picture.density)
    told = f"Density {shares}." + ("" if takes else " This method decides its density itself.")
    file = io.BytesIO()
    draw(picture, file)
    return told, np.asarray(Image.open(file).convert("RGB"))
