"""Images and videos that a task takes besides its prompt: which options it needs, and reading them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from dit_accel.errors import ConfigError
from dit_accel.presets import Preset
from dit_accel.presets.schema import TASK_INPUTS

_WORDS = {"image": "an image", "last_image": "a last image", "mask": "a mask", "video": "a control video"}


def check_inputs(preset: Preset, given: Mapping[str, Path | None]) -> None:
    """Refuse a missing input, and one that the task has no use for.

    Args:
        preset: says the task.
        given: file of every input option, None where it was left out.

    Raises:
        ConfigError: names the option.
    """
    inputs = TASK_INPUTS[preset.task]
    for name, path in given.items():
        option = f"--{name.replace('_', '-')}"
        if path is None and name in inputs.required:
            raise ConfigError(option, f"preset {preset.name} is {preset.task} and needs {_WORDS[name]}")
        if path is not None and name not in inputs.required + inputs.optional:
            raise ConfigError(option, f"preset {preset.name} is {preset.task} and does not take {_WORDS[name]}")


def read_inputs(preset: Preset, given: Mapping[str, Path | None]) -> dict[str, Any]:
    """The inputs as arguments of the pipeline's call; pictures are cut to the proportions of the result and scaled.

    Raises:
        ConfigError: a file that cannot be read, or a video that is too short.
    """
    size = (preset.generation.width, preset.generation.height)
    arguments: dict[str, Any] = {}
    for name, path in given.items():
        if path is None:
            continue
        if name == "video":
            arguments["video"] = _open_video(path, size, preset.generation.num_frames)
        elif preset.task == "vace":
            arguments["reference_images"] = [open_image(path, "--image")]
        else:
            picture = _fit(open_image(path, f"--{name.replace('_', '-')}"), size)
            arguments["mask_image" if name == "mask" else name] = picture.convert("L") if name == "mask" else picture
    return arguments


def digests(given: Mapping[str, Path | None]) -> dict[str, str]:
    """What tells the files from others, by option: a hash of their bytes, wherever they lie.

    Raises:
        ConfigError: a file that cannot be read.
    """
    files = {name: path for name, path in given.items() if path is not None}
    return {name: _digest(path, f"--{name.replace('_', '-')}") for name, path in files.items()}


def digests_within(settings: Any) -> dict[str, str]:
    """What tells files from others that settings name (trained projections, a saved plan), by their paths.

    Args:
        settings: mappings and lists of plain values. A text that is the path of a file is taken for one.

    Raises:
        ConfigError: a file that cannot be read.
    """
    return {text: _digest(Path(text), text) for text in sorted(set(_texts(settings))) if Path(text).is_file()}


def _texts(settings: Any) -> Iterator[str]:
    if isinstance(settings, str):
        yield settings
    elif isinstance(settings, Mapping | list | tuple):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _texts(value)


def _digest(path: Path, where: str) -> str:
    try:
        status = path.stat()
        return _read_digest(path, status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise ConfigError(where, f"cannot read {path}: {error.strerror}") from None


@lru_cache(maxsize=256)
def _read_digest(path: Path, _size: int, _changed: int) -> str:
    """Read once per state of a file: the lines of a batch may share it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fit(picture: Any, size: tuple[int, int]) -> Any:
    from PIL import ImageOps

    return ImageOps.fit(picture, size)


def open_image(path: Path, option: str) -> Any:
    """A picture as PIL RGB, upright: cameras turn it by a mark in the file alone.

    Raises:
        ConfigError: it cannot be read; under the name `option`.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except (OSError, UnidentifiedImageError):
        raise ConfigError(option, f"cannot read {path} as an image") from None


def _open_video(path: Path, size: tuple[int, int], frames: int) -> list[Any]:
    import imageio.v3 as imageio
    from PIL import Image

    pictures: list[Any] = []
    try:
        for pixels in imageio.imiter(path):
            pictures.append(_fit(Image.fromarray(pixels).convert("RGB"), size))
            if len(pictures) == frames:
                return pictures
    except (OSError, ValueError, TypeError):
        raise ConfigError("--video", f"cannot read {path} as a video") from None
    raise ConfigError("--video", f"expected at least {frames} frames (--num-frames), got {len(pictures)} in {path}")
