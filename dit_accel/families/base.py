"""What a model family is: its transformer, where its attention layers are, and how to read a forward pass."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from dit_accel.errors import UnsupportedError

if TYPE_CHECKING:
    from dit_accel.engine import Engine


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer that the library takes over.

    Args:
        name: path of the attention module in the transformer, for example ``blocks.0.attn1``.
        module: the attention module, whose processor is replaced.
        role: layers of one role share a processor ("self", "joint"); a role of its own gives a layer its own.
    """

    name: str
    module: Any
    role: str = "self"


@dataclass(frozen=True)
class ForwardGeometry:
    """What a family reads from the arguments of one forward pass.

    Args:
        grid: (frames, height, width) in tokens.
        batch: rows in the batch.
        timestep: the model's timestep argument; reading its value synchronises, so it is read only when
            the pipeline says no noise level.
        timestep_scale: timestep value of pure noise (1000, or 1 where the timestep is a fraction).
        text_valid: valid text tokens per batch item, where the model pads its text. None: all.
        prefix_frames: leading frames of the grid that are conditioning and not denoised.
    """

    grid: tuple[int, int, int]
    batch: int
    timestep: Tensor
    timestep_scale: float = 1000.0
    text_valid: tuple[int, ...] | None = None
    prefix_frames: int = 0


@dataclass(frozen=True)
class TokenPorts:
    """Where the video tokens of a forward pass enter the blocks and where they leave them.

    A family names ports only where everything in between treats tokens alike, attention aside. Each entry gives the
    axis of the tokens, or the first of the axes of their grid; text may stand before them on it.

    Args:
        enters: modules, by path, whose outputs (all tensors of a tuple) are tokens or tables per token.
        leaves: modules whose outputs are the tokens that leave.
        arguments: arguments of the forward pass that are given per token.
    """

    enters: Mapping[str, int]
    leaves: Mapping[str, int]
    arguments: Mapping[str, int] = field(default_factory=dict)


class Family(ABC):
    """A model family. It knows Diffusers' class and its processors; it knows nothing of methods."""

    name: ClassVar[str]
    transformer_classes: ClassVar[tuple[str, ...]]
    """Names of the Diffusers transformer classes, so that none is imported before it is needed."""
    stock_processors: ClassVar[tuple[str, ...]]
    """Names of Diffusers' own processors, the only ones that are replaced."""

    @abstractmethod
    def layers(self, model: Any) -> list[AttentionLayer]:
        """The attention layers to take over; a layer's index, in schedules and reports, is its place here."""

    @abstractmethod
    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """The processor of a role: it computes q, k, v as the stock one does and calls `engine.attend`.

        Args:
            layer: the first layer of the role.
            engine: the engine to call.
        """

    @abstractmethod
    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Read the geometry from the bound arguments of `model.forward`."""

    def token_ports(self, model: Any, arguments: dict[str, Any]) -> TokenPorts | None:
        """Where tokens may be put into another order for the whole pass. Default None: nowhere.

        Args:
            model: the transformer.
            arguments: bound arguments of `model.forward`.
        """
        return None

    def for_model(self, model: Any) -> Family:
        """The family as it applies to `model`; most families are the same for all their models."""
        return self

    def notes(self, model: Any) -> list[str]:
        """What is taken for granted or not known about `model`, for summary and report. Default: nothing to say."""
        return []

    def check_processor(self, layer: AttentionLayer) -> None:
        """Refuse a processor that is not the stock one, since replacing it would drop what it does.

        Raises:
            UnsupportedError: names the layer and the processor found.
        """
        found = type(layer.module.processor).__name__
        if found not in self.stock_processors:
            raise UnsupportedError(
                f"{layer.name}: expected Diffusers' own {' or '.join(self.stock_processors)}, found {found}; "
                "remove the other processor first (for example with set_attn_processor)"
            )


def block_layers(model: Any, blocks: str, attention: str, role: str = "self") -> list[AttentionLayer]:
    """The attention module called `attention` in every block of the list `blocks` of `model`."""
    modules = enumerate(getattr(model, blocks))
    return [AttentionLayer(f"{blocks}.{i}.{attention}", getattr(block, attention), role) for i, block in modules]


def bind_forward(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `model.forward` by name."""
    cls: Any = type(model)
    return dict(_forward_signature(cls).bind_partial(model, *args, **kwargs).arguments)


@cache
def _forward_signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


def patch_grid(latents: Tensor, patch: tuple[int, int, int]) -> tuple[int, int, int]:
    """Token grid of latents `[B, C, F, H, W]` under `patch` (frames, height, width)."""
    frames, height, width = latents.shape[2:]
    return frames // patch[0], height // patch[1], width // patch[2]


def image_grid(ids: Tensor, tokens: int) -> tuple[int, int, int]:
    """Token grid of an image and the reference images that follow it, from their position ids.

    Images of one size are frames. A reference whose tokens fill whole rows of the image's width continues it
    downwards, so that the image keeps its geometry. Otherwise all tokens are one row.

    Args:
        ids: `[N, 3 or more]` or with a batch axis before: (image, row, column) of every token.
        tokens: number of image tokens that the model is given.
    """
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3].cpu()
    starts = [0, *(torch.nonzero(ids[1:, 0] != ids[:-1, 0]).flatten() + 1).tolist(), len(ids)]
    images = [ids[a:b] for a, b in pairwise(starts)]
    sizes = [(int(image[:, 1].max()) + 1, int(image[:, 2].max()) + 1) for image in images]
    height, width = sizes[0]
    if len(ids) != tokens or height * width != len(images[0]):
        return 1, 1, tokens
    if all(size == sizes[0] for size in sizes) and tokens == len(sizes) * height * width:
        return len(sizes), height, width
    return (1, tokens // width, width) if tokens % width == 0 else (1, 1, tokens)
