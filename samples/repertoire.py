"""What the small models are taught: a repertoire draws captioned clips and knows the words of their captions.

`BASIC` is one plain shape on a plain background (`clips`), drawn with OpenCV. `FULL` is all of `scenes`, drawn with
PyTorch on the device of the training. Captions of `BASIC` are captions of `FULL`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dit_accel.errors import ConfigError
from dit_accel.samples import clips
from dit_accel.samples.clips import BACKGROUNDS, COLORS, SHAPES
from dit_accel.samples.scenes import language
from dit_accel.samples.scenes.batches import scene_batches
from dit_accel.samples.scenes.draw import Canvas
from dit_accel.samples.scenes.meaning import CHANGES, PACES, SIZES
from dit_accel.samples.scenes.render import render_scenes


@dataclass(frozen=True)
class Drawn:
    """Captioned clips.

    Args:
        pixels: in [-1, 1], `[B, 3, T, H, W]`.
        objects: where some object is, bool `[B, T, H, W]`.
        captions: B of them.
    """

    pixels: Tensor
    objects: Tensor
    captions: list[str]


@dataclass(frozen=True)
class Repertoire:
    """Clips to learn from.

    Args:
        name: of the table `REPERTOIRES`.
        text_tokens: more than any of its captions has; the last is always padding.
        vocabulary: every word of its captions, sorted.
        meanings: what captions can mean, each as a test of a caption.
        draw: see `batches`.
    """

    name: str
    text_tokens: int
    vocabulary: tuple[str, ...]
    meanings: tuple[Callable[[str], bool], ...]
    draw: Callable[[int, Canvas, int, bool, str | torch.device, int], Iterator[Drawn]]

    def batches(
        self,
        seed: int,
        canvas: Canvas,
        size: int,
        held_out: bool = False,
        device: str | torch.device = "cpu",
        workers: int = 0,
    ) -> Iterator[Drawn]:
        """Endless batches of clips, the same for the same seed.

        Args:
            seed: of everything.
            canvas: size of a clip.
            size: clips of a batch.
            held_out: combinations that are never trained on, instead of the others.
            device: where the clips go.
            workers: processes that draw scenes; 0 draws them here. `BASIC` has no use for them.
        """
        return self.draw(seed, canvas, size, held_out, device, workers)


def _draw_basic(
    seed: int, canvas: Canvas, size: int, held_out: bool, device: str | torch.device, workers: int
) -> Iterator[Drawn]:
    stream = clips.captioned_clips(seed, canvas.frames, canvas.height, canvas.width, held_out, canvas.endless)
    while True:
        shown, captions, masks = zip(*islice(stream, size), strict=True)
        yield Drawn(to_pixels(shown).to(device), torch.from_numpy(np.stack(masks)).to(device), list(captions))


def to_pixels(shown: Sequence[np.ndarray]) -> Tensor:
    """uint8 clips `[T, H, W, 3]` to a batch in [-1, 1], `[B, 3, T, H, W]`."""
    return torch.from_numpy(np.stack(shown)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def to_frames(pixels: Tensor) -> np.ndarray:
    """A clip in [-1, 1], `[3, T, H, W]`, to uint8 `[T, H, W, 3]`."""
    frames = (pixels.float().clamp(-1, 1) + 1) * 127.5
    return np.asarray(frames.round().byte().permute(1, 2, 3, 0).cpu().numpy())


def _draw_full(
    seed: int, canvas: Canvas, size: int, held_out: bool, device: str | torch.device, workers: int
) -> Iterator[Drawn]:
    for scenes, captions in scene_batches(seed, canvas, size, held_out, workers):
        pixels, objects = render_scenes(scenes, canvas, device)
        yield Drawn(pixels, objects, captions)


@dataclass(frozen=True)
class Says:
    """Whether some word of a caption begins in one of some ways."""

    beginnings: tuple[str, ...]

    def __call__(self, caption: str) -> bool:
        """Test `caption`."""
        return any(word.startswith(self.beginnings) for word in caption.split())


SHAPE_MEANINGS = tuple(Says(tuple(names)) for names in SHAPES.values())
_BASIC_MEANINGS = (*(Says((name,)) for name in (*COLORS, *BACKGROUNDS, "left", "right", "up", "down")), *SHAPE_MEANINGS)
_FULL_MEANINGS = (
    *_BASIC_MEANINGS,
    *(Says(tuple(names)) for table in (SIZES, CHANGES, PACES) for names in table.values()),
    *(Says(tuple(names)) for names in (("bounc",), ("standing", "rest"), ("strip",), ("check",), ("dot",))),
    *(Says(tuple(names)) for names in (("drift",), ("camera",), ("and",))),
)
BASIC = Repertoire("basic", 24, tuple(clips.vocabulary()), _BASIC_MEANINGS, _draw_basic)
FULL = Repertoire("full", 48, tuple(language.vocabulary()), _FULL_MEANINGS, _draw_full)
REPERTOIRES = {repertoire.name: repertoire for repertoire in (BASIC, FULL)}


def repertoire_of(tokenizer: PreTrainedTokenizerFast) -> Repertoire:
    """The largest repertoire all of whose words `tokenizer` knows: the one its model was trained on.

    Raises:
        ConfigError: it knows the words of none.
    """
    known = tokenizer.get_vocab().keys()
    fitting = [r for r in REPERTOIRES.values() if known >= set(r.vocabulary)]
    if not fitting:
        raise ConfigError("model", f"expected the words of one of {', '.join(REPERTOIRES)}, got another tokenizer")
    return max(fitting, key=lambda repertoire: len(repertoire.vocabulary))
