"""Write videos and images: the path is checked before the first step, the file appears under its name when complete."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import imageio.v2 as imageio
import numpy as np

from dit_accel.errors import ConfigError, UnsupportedError

EXTENSIONS = (".mp4", ".gif", ".png")
_REMEDIES = "--backend torch, then --method dense, then --dtype bfloat16 or float32"


class OutputFile:
    """A file to be written at the end of a long run.

    Makes the folder, and proves that it can be written to. An existing file is replaced only when the new one is
    complete, and where it cannot be replaced then, the new one stays beside it. ".png" holds a single image, for a
    video its first frame.

    Args:
        path: where the result goes; the extension says the format.

    Raises:
        ConfigError: unknown extension, a directory, a folder that cannot be made or written to, or no ffmpeg.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix.lower() not in EXTENSIONS:
            raise ConfigError("output", f"expected a name that ends in {', '.join(EXTENSIONS)}, got {str(path)!r}")
        if self.path.is_dir():
            raise ConfigError("output", f"{path} is a directory; give a file name in it")
        if self.path.suffix.lower() == ".mp4":
            check_encoder()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".partial-", suffix=self.path.suffix.lower(), dir=self.path.parent)
        except OSError as error:
            raise ConfigError("output", f"cannot write in {self.path.parent}: {error.strerror}") from None
        os.close(handle)
        self._partial = Path(name)
        self._is_kept = False

    def write(self, frames: np.ndarray, fps: int) -> None:
        """Write `frames` and give the file its name.

        Args:
            frames: `[T, H, W, 3]`, uint8, or float in [0, 1].
            fps: frames per second.

        Raises:
            UnsupportedError: the file of an earlier run cannot be replaced; names the file that holds the result.
        """
        pixels = to_uint8(frames)
        suffix = self.path.suffix.lower()
        if suffix == ".png":
            imageio.imwrite(self._partial, pixels[0])
        elif suffix == ".gif":
            imageio.mimwrite(self._partial, list(pixels), duration=1000 / fps, loop=0)
        else:
            write_mp4(self._partial, pixels, fps)
        with suppress(OSError):  # some network drives know no modes
            self._partial.chmod(0o644)
        try:
            os.replace(self._partial, self.path)
        except OSError as error:  # on Windows: a player has the old file open
            self._is_kept = True
            raise UnsupportedError(
                f"output: {self.path} cannot be replaced ({error.strerror}); the result is in {self._partial}"
            ) from None

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._is_kept:
            self._partial.unlink(missing_ok=True)


def check_frames(frames: np.ndarray, remedies: str = _REMEDIES) -> None:
    """Refuse frames that would be written as black ones.

    Args:
        frames: `[T, H, W, 3]`, float.
        remedies: what to try, as options of the command.

    Raises:
        UnsupportedError: they hold NaN or infinite numbers.
    """
    if not np.isfinite(frames).all():
        raise UnsupportedError(
            f"frames hold NaN or infinite numbers, so they were not written; try {remedies}: "
            "docs/troubleshooting.md says what each tells"
        )


def check_encoder() -> None:
    """Find ffmpeg now and not when a long run is over.

    Raises:
        ConfigError: there is none.
    """
    import imageio_ffmpeg

    try:
        imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError:
        raise ConfigError(
            "output", "there is no ffmpeg for .mp4 here; install one (or set IMAGEIO_FFMPEG_EXE), or write a .gif"
        ) from None


def to_uint8(frames: np.ndarray) -> np.ndarray:
    """Frames `[T, H, W, 3]` as uint8; floats are taken as [0, 1]."""
    if frames.dtype == np.uint8:
        return frames
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> None:
    """H.264, yuv420p, index at the front: what ordinary players open. Odd sizes are cut by one pixel.

    Args:
        path: file to write.
        frames: uint8 `[T, H, W, 3]`.
        fps: frames per second.
    """
    height, width = (size - size % 2 for size in frames.shape[1:3])
    options: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv420p", "quality": 8, "macro_block_size": 2}
    writer: Any = imageio.get_writer(path, fps=fps, output_params=["-movflags", "+faststart"], **options)
    with writer:
        for frame in frames:
            writer.append_data(np.ascontiguousarray(frame[:height, :width]))
