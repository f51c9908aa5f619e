"""`generate-video --stream`: a video that is written while it is made, with prompts that change on the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
import yaml

from dit_accel.cli.app import console
from dit_accel.cli.files import report_path, write_json
from dit_accel.cli.inputs import open_image
from dit_accel.cli.overrides import frames_of, override_generation
from dit_accel.cli.prompts import LivePrompts, PromptChange, read_prompts
from dit_accel.errors import ConfigError
from dit_accel.models import fit_to_model
from dit_accel.presets import Preset, streaming_preset
from dit_accel.streaming import STREAM_PRESETS, StreamAttention, StreamSettings, stream_preset, stream_settings
from dit_accel.video.growing import StreamingVideoFile

_SHARED = {
    *("prompt", "output", "preset", "negative_prompt", "height", "width", "num_frames", "seconds"),
    *("guidance_scale", "fps", "seed", "image", "model", "device", "dtype", "method", "density", "report"),
}
_OWN = ["num_chunks", "prompts_file", "live", "stream_settings", "checkpoint", "lora"]
_LENGTHS = ("num_chunks", "num_frames", "seconds")
METHOD_HELP = "Method instead of the preset's; of a stream also light_forcing, flashblock or compressed_memory."
SETTINGS_HELP = f"Settings of a stream: {', '.join(STREAM_PRESETS)}, or a YAML file. Default: the preset's."


@dataclass(frozen=True)
class _Request:
    """What a stream is made from; see the options of the command."""

    preset: Preset
    settings: StreamSettings
    changes: list[PromptChange]
    output: Path
    report: Path
    chunks: int | None
    options: Mapping[str, Any]

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.options["height"] or self.preset.generation.height)

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.options["width"] or self.preset.generation.width)

    @property
    def fps(self) -> int:
        """Frames per second of the file."""
        return int(self.options["fps"] or self.preset.generation.fps or 16)


def is_stream(context: typer.Context) -> bool:
    """Whether `generate-video` is to stream.

    Raises:
        ConfigError: an option of streams without `--stream`.
    """
    if context.params["stream"]:
        return True
    for name in _OWN:
        if name in _given(context):
            raise ConfigError(f"--{name.replace('_', '-')}", "is for streams; add --stream")
    return False


def _given(context: typer.Context) -> set[str]:
    """Names of the options that the user set."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def run_stream(context: typer.Context) -> None:
    """Stream to a file, and report.

    Raises:
        ConfigError: an option that a stream does not take, or a value that is wrong.
    """
    for name in sorted(_given(context)):
        if name not in (*_SHARED, *_OWN, "stream"):
            raise ConfigError(f"--{name.replace('_', '-')}", "a stream does not take it; leave it out")
    request = _request(context.params)
    with StreamingVideoFile(request.output, request.fps) as file:
        _stream(request, file)


def _request(options: Mapping[str, Any]) -> _Request:
    preset = _preset(options)
    settings = _settings(options, preset)
    if options["negative_prompt"] and settings.guidance_scale <= 1:
        raise ConfigError("--negative-prompt", "this stream runs without guidance; give --guidance-scale above 1")
    changes = [] if options["prompts_file"] is None else read_prompts(options["prompts_file"])
    prompts = options["prompt"] or []
    if len(prompts) > 1:
        raise ConfigError("--prompt", "a stream begins with one; later ones go into --prompts-file with their chunk")
    if prompts and prompts[0]:
        if changes and changes[0].chunk == 1:
            raise ConfigError("--prompt", "the prompts file has a prompt for chunk 1 already; leave one of them out")
        changes.insert(0, PromptChange(prompt=prompts[0]))
    if not changes or changes[0].chunk != 1:
        raise ConfigError("--prompt", "expected a text, or a prompts file with a prompt for chunk 1")
    chunks = _chunks(options, preset, settings)
    if chunks is not None and changes[-1].chunk > chunks:
        raise ConfigError(
            "--prompts-file", f"expected prompts for chunks 1 to {chunks}, which the stream has, got one for chunk "
            f"{changes[-1].chunk}; make the stream longer (--num-chunks) or leave it out"
        )  # fmt: skip
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{preset.name.replace('/', '-')}-stream-seed{options['seed']}.mp4"
    output = options["output"] or Path("outputs") / stamp
    report = report_path(options["report"], output)
    return _Request(preset, settings, changes, output, report, chunks, options)


def _preset(options: Mapping[str, Any]) -> Preset:
    """The preset to stream with, at the size that was asked for."""
    model = options["model"]
    preset = fit_to_model(streaming_preset(options["preset"], bool(model or options["checkpoint"])), model)
    if model is not None:  # it has a geometry of its own, known when it is loaded
        return preset
    return override_generation(preset, {name: options[name] for name in ("height", "width", "fps")}, model)


def _settings(options: Mapping[str, Any], preset: Preset) -> StreamSettings:
    """The settings that --stream-settings names, or the preset's, with the guidance of the command line."""
    chosen = options["stream_settings"]
    if chosen is None:
        settings = preset.stream or StreamSettings()
    elif Path(chosen).suffix in (".yaml", ".yml"):
        try:
            content = yaml.safe_load(Path(chosen).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError("--stream-settings", f"cannot read {chosen}: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict):
            raise ConfigError("--stream-settings", f"expected names and values in {chosen}")
        settings = stream_settings(str(chosen), **content)
    else:
        settings = stream_preset(chosen)
    if options["guidance_scale"] is not None:
        settings = stream_settings("stream", **{**settings.model_dump(), "guidance_scale": options["guidance_scale"]})
    if options["density"] is not None and options["method"] is None:
        raise ConfigError("--density", "a stream is dense unless --method names a method")
    if options["method"] is not None:
        parameters = {} if options["density"] is None else {"density": options["density"]}
        attention = StreamAttention(name=options["method"], parameters=parameters)
        settings = settings.model_copy(update={"attention": attention})
    return settings


def _chunks(options: Mapping[str, Any], preset: Preset, settings: StreamSettings) -> int | None:
    """Chunks to make: as told, else enough for the frames of the preset; endless while prompts are typed."""
    lengths = [f"--{name.replace('_', '-')} {options[name]}" for name in _LENGTHS if options[name] is not None]
    if len(lengths) > 1:
        raise ConfigError("--num-chunks, --num-frames, --seconds", f"expected one of them, got {' and '.join(lengths)}")
    if options["num_chunks"] is not None:
        return int(options["num_chunks"])
    frames = options["num_frames"]
    if options["seconds"] is not None:
        frames = frames_of(options["seconds"], frames, preset, options["fps"])
    if options["live"] and frames is None:
        return None
    frames = frames or preset.generation.num_frames
    latents = 1 + (frames - 1) / preset.model.vae_temporal
    first = settings.first_chunk or settings.chunk
    return 1 + max(0, math.ceil((latents - first) / settings.chunk))


def _stream(request: _Request, file: StreamingVideoFile) -> None:
    """Load, stream, write, report; an interrupt ends the video where it is."""
    from dit_accel.models import quiet_loading
    from dit_accel.pipelines.streaming import StreamingWanPipeline
    from dit_accel.pipelines.streaming.policies import make_policy

    options, first = request.options, request.changes[0]
    policy = make_policy(request.settings)
    start = None if options["image"] is None else open_image(options["image"], "--image")
    quiet_loading()
    model = options["model"] or request.preset.repository
    console.print(f"{request.preset.name}: loading {model}", markup=False)
    pipe = StreamingWanPipeline.from_preset(
        options["preset"], options["model"], options["device"], options["dtype"], options["checkpoint"], options["lora"]
    )
    begun = time.perf_counter()
    stream = pipe.stream(
        first.prompt,
        negative_prompt=options["negative_prompt"],
        seed=options["seed"],
        num_chunks=request.chunks,
        height=request.height,
        width=request.width,
        settings=request.settings,
        start=start,
        policy=policy,
    )
    record = _Record(request, stream, file, begun)
    try:
        record.follow(LivePrompts(sys.stdin) if options["live"] else None)
    except KeyboardInterrupt:
        console.print("interrupted; the video ends here")
    record.finish()


class _Record:
    """Writes the chunks of a stream, changes its prompts, and keeps the times."""

    def __init__(self, request: _Request, stream: Any, file: StreamingVideoFile, begun: float) -> None:
        self.request, self.stream, self.file, self.begun = request, stream, file, begun
        self.denoise: list[float] = []
        self.decode: list[float] = []
        self.frames: list[int] = []
        self.latency = 0.0
        self.prompts = [request.changes[0].model_dump()]
        self._planned = {change.chunk: change for change in request.changes[1:]}

    def follow(self, live: LivePrompts | None) -> None:
        """Until the stream ends, or the typed input does."""
        for chunk in self.stream:
            self.file.write(chunk.frames)
            self.latency = self.latency or time.perf_counter() - self.begun
            self.denoise.append(chunk.denoise)
            self.decode.append(chunk.decode)
            self.frames.append(len(chunk.frames))
            console.print(
                f"chunk {chunk.index + 1}: {self.file.frames / self.request.fps:.1f} s of video, "
                f"denoise {chunk.denoise:.2f} s, decode {chunk.decode:.2f} s"
            )
            change = self._planned.pop(chunk.index + 2, None)
            if live is not None:
                state = live.look()
                change = state.change or change
                if state.ended and self.request.chunks is None:
                    self.stream.finish()
            if change is not None:
                self.stream.set_prompt(change.prompt, change.mode, change.over)
                self.prompts.append({**change.model_dump(), "chunk": chunk.index + 2})
                console.print(f"prompt from chunk {chunk.index + 2}: {change.prompt} ({change.mode})", markup=False)

    def finish(self) -> None:
        """Close the video and write the report."""
        total = time.perf_counter() - self.begun
        self.file.close()
        if not self.frames:
            return
        rates = {
            "denoise_fps": sum(self.frames) / max(sum(self.denoise), 1e-9),
            "end_to_end_fps": sum(self.frames) / total,
            "first_frame_latency_s": self.latency,
            "cache_bytes": self.stream.cache_bytes,
        }
        console.print(
            f"denoising {rates['denoise_fps']:.2f} fps, end to end {rates['end_to_end_fps']:.2f} fps, "
            f"first frame after {self.latency:.2f} s, caches {rates['cache_bytes'] / 2**20:.1f} MiB"
        )
        times = {**rates, "denoise_s": self.denoise, "decode_s": self.decode}
        calls = {"chunks": self.stream.chunk_sums, **self.stream.report().to_dict()}
        _write_report(self.request, {**times, **calls}, self.prompts)
        console.print(f"video: {self.request.output}\nreport: {self.request.report}", markup=False)


def _write_report(request: _Request, measured: dict[str, Any], prompts: list[dict[str, Any]]) -> None:
    content = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "preset": request.preset.model_dump(mode="json"),
        "stream": request.settings.model_dump(mode="json"),
        "prompts": prompts,
        "seed": request.options["seed"],
        "size": [request.height, request.width],
        "fps": request.fps,
        **measured,
    }
    write_json(request.report, content)
