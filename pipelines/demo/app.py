"""The page of the demo: tabs over a `Studio`."""

from __future__ import annotations

import os
from pathlib import Path

import gradio as gr

from dit_accel.pipelines.demo.generate_tab import generate_tab
from dit_accel.pipelines.demo.jobs import Studio
from dit_accel.pipelines.demo.methods_tab import methods_tab
from dit_accel.pipelines.demo.stream_tab import stream_tab

UPLOAD_LIMIT = "8mb"


def build(studio: Studio, example: str = "a red ball moving right") -> gr.Blocks:
    """The page. Nothing is loaded before the first job."""
    with gr.Blocks(title="dit_accel", analytics_enabled=False) as page:
        gr.Markdown(
            "# dit_accel\nThe same prompt and seed, once with dense attention and once accelerated. "
            f"Model: `{studio.preset.repository}`."
        )
        with gr.Tabs():
            with gr.Tab("Generate", id="generate"):
                report = gr.HTML("Nothing was generated yet.", render=False, elem_id="report")
                generate_tab(studio, example, report)
            with gr.Tab("Report", id="report-tab"):
                report.render()
            with gr.Tab("Methods", id="methods-tab"):
                methods_tab(studio)
            with gr.Tab("Stream", id="stream-tab"):
                stream_tab(studio, example)
    return page


def launch(
    studio: Studio, host: str = "127.0.0.1", port: int = 7860, share: bool = False, wait: bool = True
) -> tuple[gr.Blocks, str]:
    """Serve the page.

    Args:
        studio: what runs the jobs.
        host, port: where to listen. Default: this machine alone; port 0 takes a free one.
        share: ask Gradio for a public address. Default False.
        wait: keep serving until interrupted; False returns at once.

    Returns:
        The page and its local address.
    """
    studio.output_dir.mkdir(parents=True, exist_ok=True)
    # Gradio serves what lies under its own cache folder: with this nothing else of the disk needs to be allowed.
    os.environ["GRADIO_TEMP_DIR"] = str(Path(studio.output_dir).resolve())
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    page = build(studio).queue(max_size=16, default_concurrency_limit=1)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port or None,
        share=share,
        max_file_size=UPLOAD_LIMIT,
        prevent_thread_lock=not wait,
        show_error=True,
        footer_links=[],
    )
    return page, address
