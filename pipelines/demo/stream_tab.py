"""The page's tab of streams: a video that grows, and a prompt box that takes effect at the next chunk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from dit_accel.errors import DitAccelError
from dit_accel.pipelines.demo.generate_tab import cancel, whole_number
from dit_accel.pipelines.demo.jobs import Cancelled, Studio
from dit_accel.pipelines.demo.streams import Change, Grown, History, Streamer


def stream_tab(studio: Studio, example: str) -> None:
    """Lay out the tab and connect it."""
    studio = studio.for_streams()
    streamer, size = Streamer(studio), studio.preset.generation
    if studio.preset.stream is None:
        gr.Markdown(
            "This model was not trained to stream: the stream runs and its quality is poor. "
            "It shows the mechanism, not the model."
        )
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            prompt = gr.Textbox(example, label="Prompt", elem_id="stream-prompt", max_length=2000)
            mode = gr.Radio(["cut", "recache", "blend"], value="cut", label="How it changes", elem_id="stream-mode")
            say = gr.Button("Change at the next chunk", elem_id="stream-say")
            with gr.Row():
                height = gr.Number(size.height, label="Height", precision=0, min_width=80, elem_id="stream-height")
                width = gr.Number(size.width, label="Width", precision=0, min_width=80, elem_id="stream-width")
            with gr.Row():
                chunks = gr.Number(12, label="Chunks", precision=0, min_width=80, elem_id="stream-chunks")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=80, elem_id="stream-seed")
            with gr.Row():
                start = gr.Button("Stream", variant="primary", elem_id="stream-start")
                stop = gr.Button("Cancel", variant="stop", elem_id="stream-cancel")
            upload = gr.File(label="Replay a history", file_types=[".json"], type="binary", elem_id="stream-replay")
        with gr.Column(scale=2, min_width=280):
            status = gr.Markdown("Ready.", elem_id="stream-status")
            video = gr.Video(label="So far", autoplay=True, elem_id="stream-video", interactive=False)
            saved = gr.File(label="History", elem_id="stream-history", interactive=False)

    def begin(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _stream(streamer, *values)

    def change(text: str, how: str) -> str:
        try:
            is_taken = streamer.say(text, how)
        except DitAccelError as error:
            return f"**Error:** {error}"
        return "The prompt changes at the next chunk." if is_taken else "There is no next chunk."

    inputs, outputs = [prompt, height, width, chunks, seed, upload], [status, video, saved]
    gr.on(
        [start.click],
        begin,
        inputs,
        outputs,
        concurrency_id="job",
        concurrency_limit=1,
        api_name=False,
        show_progress="hidden",
    )
    say.click(change, [prompt, mode], status, queue=False, api_name=False)
    stop.click(lambda: cancel(studio), None, None, queue=False, api_name=False)


def _stream(
    streamer: Streamer, prompt: str, height: float, width: float, chunks: float, seed: float, replay: bytes | None
) -> Iterator[tuple[Any, ...]]:
    """Run the stream and yield status, video so far and the saved history."""
    studio = streamer.studio
    path: Path | None = None
    made = 0
    try:
        history = _history(prompt, height, width, chunks, seed, replay)
        yield "Loading the model.", None, None
        for grown in streamer.run(history, studio.preset.generation.fps):
            path, made = grown.path, grown.chunk + 1
            told = _told(grown, history)
            yield told, str(path), None
        if path is not None:
            yield f"Done. {told}", str(path), str(_save(history, path))
    except Cancelled:
        saved = None if path is None else str(_save(history.up_to(made), path))
        yield "Cancelled.", None if path is None else str(path), saved
    except (DitAccelError, ValueError, RuntimeError) as error:
        yield f"**Error:** {' '.join(str(error).split())}", None, None


def _history(prompt: str, height: float, width: float, chunks: float, seed: float, replay: bytes | None) -> History:
    if replay is not None:
        return History.from_json(replay.decode("utf-8"))
    if not prompt.strip():
        raise ValueError("The prompt is empty.")
    numbers = {"seed": seed, "height": height, "width": width, "chunks": chunks}
    return History(**{name: whole_number(name, value) for name, value in numbers.items()}, changes=[Change(0, prompt)])


def _told(grown: Grown, history: History) -> str:
    return (
        f"Chunk {grown.chunk + 1} of {history.chunks}, {grown.frames} frames: "
        f"{grown.denoise_fps:.1f} frames/s denoising, {grown.total_fps:.1f} end to end, "
        f"first frame after {grown.first_latency:.1f} s. Prompt: {grown.prompt}"
    )


def _save(history: History, video: Path) -> Path:
    target = video.with_suffix(".json")
    target.write_text(history.to_json(), encoding="utf-8")
    return target
