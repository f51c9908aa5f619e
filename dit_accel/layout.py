"""Where video (or image) tokens and text tokens stand in the sequence that one attention call sees."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_accel.errors import ConfigError, PlanError
from dit_accel.plan import Blocking
from dit_accel.transfer import to_device

TextPosition = Literal["none", "before", "after"]


@dataclass(frozen=True)
class TokenLayout:
    """The geometry of one attention sequence: a raster of video tokens, with text before it, after it, or nowhere.

    Args:
        grid: (frames, height, width) in tokens; an image has one frame.
        text: number of text tokens in the sequence, padding included. Default 0.
        text_position: "none" (Wan), "after" the video (HunyuanVideo) or "before" it (FLUX, CogVideoX).
        valid: per batch item, how many leading tokens of the sequence are real; the rest is padding. None: all.
            Padding therefore always stands last, and is a length, never an N x N mask.
        prefix_frames: leading frames of the grid that are conditioning (image-to-video first frame, reference
            images); methods keep them as they keep a sink. Default 0.

    Raises:
        PlanError: a size below 1, text without a position, or a valid length outside the sequence.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_position: TextPosition = "none"
    valid: tuple[int, ...] | None = None
    prefix_frames: int = 0

    def __post_init__(self) -> None:
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise PlanError(f"TokenLayout.grid: expected (frames, height, width), each at least 1, got {self.grid}")
        if self.text_position not in get_args(TextPosition) or (self.text > 0) != (self.text_position != "none"):
            raise PlanError(
                f"TokenLayout: text={self.text} does not go with text_position={self.text_position!r}; "
                "use 'before' or 'after' with text tokens and 'none' without"
            )
        if self.valid is not None and not all(0 < n <= self.tokens for n in self.valid):
            raise PlanError(f"TokenLayout.valid: expected lengths in [1, {self.tokens}], got {self.valid}")
        if not 0 <= self.prefix_frames <= self.grid[0]:
            raise PlanError(f"TokenLayout.prefix_frames: expected 0 to {self.grid[0]}, got {self.prefix_frames}")

    @property
    def frames(self) -> int:
        """Number of (latent) frames in the grid."""
        return self.grid[0]

    @property
    def frame_tokens(self) -> int:
        """Tokens per frame."""
        return self.grid[1] * self.grid[2]

    @property
    def video(self) -> int:
        """Number of video tokens."""
        return self.frames * self.frame_tokens

    @property
    def prefix(self) -> int:
        """Number of tokens of conditioning frames, which lead the video."""
        return self.prefix_frames * self.frame_tokens

    @property
    def tokens(self) -> int:
        """Length of the whole sequence, text and padding included."""
        return self.video + self.text

    @property
    def video_start(self) -> int:
        """Index of the first video token."""
        return self.text if self.text_position == "before" else 0

    @property
    def text_start(self) -> int:
        """Index of the first text token (the end of the sequence when there is none)."""
        return 0 if self.text_position == "before" else self.video

    @property
    def is_padded(self) -> bool:
        """Whether some batch item has fewer valid tokens than the sequence."""
        return self.valid is not None and min(self.valid) < self.tokens

    @property
    def pads_video(self) -> bool:
        """Whether some batch item has fewer valid tokens than those up to the end of the video."""
        return self.valid is not None and min(self.valid) < self.video_slice().stop

    def valid_lengths(self, device: torch.device) -> Tensor | None:
        """Valid keys per batch item, int32 `[B]` on `device`, as kernels take them; None when nothing is padded."""
        if not self.is_padded or self.valid is None:
            return None
        return to_device(torch.tensor(self.valid, dtype=torch.int32), device)

    def video_slice(self) -> slice:
        """The video tokens, as a slice of the token axis."""
        return slice(self.video_start, self.video_start + self.video)

    def text_slice(self) -> slice:
        """The text tokens, as a slice of the token axis."""
        return slice(self.text_start, self.text_start + self.text)

    def blocks(self, size: int, video: Blocking | None = None) -> Blocking:
        """Cut the sequence into blocks of `size`; text and video never share a block.

        Args:
            size: block length in tokens.
            video: how the video part is cut (tiles, frames). Default: every `size` tokens.
        """
        video = Blocking.uniform(self.video, size) if video is None else video
        if video.tokens != self.video:
            raise PlanError(f"TokenLayout.blocks: expected a blocking of {self.video} video tokens, got {video.tokens}")
        if not self.text:
            return video
        text = Blocking.uniform(self.text, size).lengths
        parts = [text, video.lengths] if self.text_position == "before" else [video.lengths, text]
        return Blocking.from_lengths(torch.cat(parts), max(size, video.size))

    def text_blocks(self, blocks: Blocking) -> Tensor:
        """Bool `[n]`: which of `blocks` (made by `self.blocks`) hold text tokens."""
        first = blocks.starts[:-1]
        return (first >= self.text_start) & (first < self.text_start + self.text)

    @cached_property
    def coordinates(self) -> Tensor:
        """(frame, row, column) of every video token in raster order, int32 `[video, 3]` on the CPU."""
        _, height, width = self.grid
        index = torch.arange(self.video, dtype=torch.int32)
        return torch.stack([index // (height * width), index // width % height, index % width], dim=-1)


def parse_grid(text: str) -> tuple[int, int, int]:
    """`21x30x52` as (frames, height, width); an image may leave out the frames.

    Raises:
        ConfigError: another form, or a size of 0.
    """
    parts = text.lower().split("x")
    if len(parts) not in (2, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError("grid", f"expected FRAMESxHEIGHTxWIDTH in tokens, for example 21x30x52, got {text!r}")
    sizes = [int(part) for part in parts]
    return (1, sizes[0], sizes[1]) if len(sizes) == 2 else (sizes[0], sizes[1], sizes[2])
