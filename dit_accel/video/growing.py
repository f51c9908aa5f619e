"""Write a video while it is made, in a form that plays at any moment, even after the process was killed."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

import imageio.v2 as imageio
import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.video.files import check_encoder, to_uint8

# Every second begins a fragment that is complete in itself; nothing waits in a buffer.
_FRAGMENTS = ["-movflags", "frag_keyframe+empty_moov+default_base_moof", "-flush_packets", "1"]


class StreamingVideoFile:
    """A fragmented MP4 (H.264, yuv420p) that grows frame by frame.

    Args:
        path: file to write; an existing one is replaced at the first frame.
        fps: frames per second.

    Raises:
        ConfigError: another extension than .mp4, a folder that cannot be made, or no ffmpeg.
    """

    def __init__(self, path: str | Path, fps: int) -> None:
        self.path, self.fps = Path(path).expanduser(), fps
        if self.path.suffix.lower() != ".mp4":
            raise ConfigError("output", f"expected a name that ends in .mp4 for a stream, got {str(path)!r}")
        check_encoder()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab"):
                pass
        except OSError as error:
            raise ConfigError("output", f"cannot write {self.path}: {error.strerror}") from None
        self.frames = 0
        self._writer: Any = None

    def write(self, frames: np.ndarray) -> None:
        """Append frames `[T, H, W, 3]`, uint8, or float in [0, 1]; odd sizes are cut by one pixel."""
        if self._writer is None:
            self._writer = self._open()
        height, width = (size - size % 2 for size in frames.shape[1:3])
        for frame in to_uint8(frames):
            self._writer.append_data(np.ascontiguousarray(frame[:height, :width]))
        self.frames += len(frames)

    def _open(self) -> Any:
        options: dict[str, Any] = {"codec": "libx264", "pixelformat": "yuv420p", "quality": 8, "macro_block_size": 2}
        live = ["-g", str(self.fps), "-tune", "zerolatency", *_FRAGMENTS]
        return imageio.get_writer(self.path, fps=self.fps, output_params=live, **options)

    def close(self) -> None:
        """Finish the file; one without frames is removed."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        elif not self.frames and self.path.is_file() and not self.path.stat().st_size:
            self.path.unlink()

    def __enter__(self) -> StreamingVideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
