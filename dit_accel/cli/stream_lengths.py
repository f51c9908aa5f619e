"""How long a stream is: its chunks, the latent frames before each, and whether the model has positions for them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from dit_accel.cli.overrides import frames_of
from dit_accel.cli.prompts import PromptChange
from dit_accel.errors import ConfigError
from dit_accel.presets import Preset
from dit_accel.streaming import StreamSettings

_LENGTHS = ("num_chunks", "num_frames", "seconds")


def chunks_of(options: Mapping[str, Any], preset: Preset, settings: StreamSettings) -> int | None:
    """Chunks of a stream, an image that it begins with among them: as told, else enough for the frames of the preset.

    Args:
        options: of the command line, by name.
        preset: says the usual number of frames, and the autoencoder.
        settings: say how long a chunk is.

    Returns:
        The number; None: endless, which streams are while prompts are typed and no length was given.

    Raises:
        ConfigError: two options that say the length, or one chunk for a stream that begins with an image.
    """
    lengths = [f"--{name.replace('_', '-')} {options[name]}" for name in _LENGTHS if options[name] is not None]
    if len(lengths) > 1:
        raise ConfigError("--num-chunks, --num-frames, --seconds", f"expected one of them, got {' and '.join(lengths)}")
    given = int(options["image"] is not None)
    if options["num_chunks"] is not None:
        if options["num_chunks"] <= given:
            raise ConfigError("--num-chunks", "expected at least 2, since the image is the first chunk, got 1")
        return int(options["num_chunks"])
    frames = options["num_frames"]
    if options["seconds"] is not None:
        frames = frames_of(options["seconds"], frames, preset, options["fps"])
    if options["live"] and frames is None:
        return None
    frames = frames or preset.generation.num_frames
    latents = 1 + (frames - 1) / preset.model.vae_temporal
    return 1 + max(given, math.ceil((latents - frames_before(2, settings, bool(given))) / settings.chunk))


def frames_before(chunk: int, settings: StreamSettings, has_image: bool) -> int:
    """Latent frames before a chunk.

    Args:
        chunk: its number, from 1.
        settings: say how long chunks are.
        has_image: whether the first chunk is an image, which is one frame.
    """
    if chunk == 1:
        return 0
    first = 1 if has_image else settings.first_chunk or settings.chunk
    return first + (chunk - 2) * settings.chunk


def check_positions(
    chunks: int, settings: StreamSettings, changes: Sequence[PromptChange], has_image: bool, table: int
) -> None:
    """Refuse a stream that would outlive the model's table of positions, before the hours until then are spent.

    Args:
        chunks: of the whole stream.
        settings: of the stream; only "absolute" positions end.
        changes: of the prompt. A cut begins a new scene, whose positions begin at 0.
        has_image: as in `frames_before`.
        table: frames that the model has positions for.

    Raises:
        ConfigError: a scene that is longer.
    """
    renewed = not settings.keep_sink and any(change.mode in ("recache", "blend") for change in changes)
    if settings.positions != "absolute" or renewed:  # where the sink is renewed, so are positions, in the middle
        return
    begins = [1, *(change.chunk for change in changes if change.mode == "cut" and change.chunk > 1), chunks + 1]
    at = [frames_before(chunk, settings, has_image) for chunk in begins]
    longest = max(end - begin for begin, end in pairwise(at))
    if longest > table:
        raise ConfigError(
            "stream.positions", f"expected at most {table} latent frames in a scene, for which the model has absolute "
            f"positions, got {longest}; make the stream shorter (--num-chunks), plan a cut, or choose endless "
            "positions (--stream-settings longlive-endless, or positions: reindex in a file)"
        )  # fmt: skip
