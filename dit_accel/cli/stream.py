"""`generate-video --stream`: a video that is written while it is made, with prompts that change on the way."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer
import yaml

from dit_accel.cli.app import console
from dit_accel.cli.files import report_path
from dit_accel.cli.inputs import open_image
from dit_accel.cli.overrides import override_generation
from dit_accel.cli.prompts import LivePrompts, PromptChange, read_prompts
from dit_accel.cli.stream_lengths import check_positions, chunks_of
from dit_accel.cli.stream_record import StreamRecord, StreamRequest
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
METHOD_HELP = "Method instead of the preset's; of a stream also light_forcing, flashblock or compressed_memory."
SETTINGS_HELP = f"Settings of a stream: {', '.join(STREAM_PRESETS)}, or a YAML file. Default: the preset's."


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


def _request(options: Mapping[str, Any]) -> StreamRequest:
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
    chunks = chunks_of(options, preset, settings)
    if chunks is not None and changes[-1].chunk > chunks:
        raise ConfigError(
            "--prompts-file", f"expected prompts for chunks 1 to {chunks}, which the stream has, got one for chunk "
            f"{changes[-1].chunk}; make the stream longer (--num-chunks) or leave it out"
        )  # fmt: skip
    stamp = f"{time.strftime('%Y%m%d-%H%M%S')}-{preset.name.replace('/', '-')}-stream-seed{options['seed']}.mp4"
    output = options["output"] or Path("outputs") / stamp
    report = report_path(options["report"], output)
    return StreamRequest(preset, settings, changes, output, report, chunks, options)


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


def _stream(request: StreamRequest, file: StreamingVideoFile) -> None:
    """Load, stream, write, report."""
    from dit_accel.pipelines.streaming.policies import make_policy

    options = request.options
    policy = make_policy(request.settings)
    start = open_image(options["image"], "--image") if request.has_image else None
    pipe = _load(request)
    begun = time.perf_counter()
    stream = pipe.stream(
        request.changes[0].prompt,
        negative_prompt=options["negative_prompt"],
        seed=options["seed"],
        num_chunks=None if request.chunks is None else request.chunks - request.has_image,
        height=request.height,
        width=request.width,
        settings=request.settings,
        start=start,
        policy=policy,
    )
    live = LivePrompts(sys.stdin) if options["live"] else None
    StreamRecord(request, stream, file, begun).follow(live)


def _load(request: StreamRequest) -> Any:
    """The pipeline, whose positions last as long as the stream."""
    from dit_accel.models import quiet_loading
    from dit_accel.pipelines.streaming import StreamingWanPipeline

    quiet_loading()
    options = request.options
    console.print(f"{request.preset.name}: loading {options['model'] or request.preset.repository}", markup=False)
    names = ("preset", "model", "device", "dtype", "checkpoint", "lora")
    pipe = StreamingWanPipeline.from_preset(*(options[name] for name in names))
    if request.chunks is not None and not options["live"]:  # a cut may be typed in time
        table = pipe.transformer.config.rope_max_seq_len
        check_positions(request.chunks, request.settings, request.changes, request.has_image, table)
    return pipe
