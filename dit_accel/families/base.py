"""What a model family is: its transformer, where its attention layers are, and how to read a forward pass."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from dit_accel.errors import UnsupportedError
from dit_accel.layout import TextPosition

if TYPE_CHECKING:
    from dit_accel.engine import Engine


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One attention layer that the library takes over.

    Args:
        name: path of the attention module in the transformer, for example ``blocks.0.attn1``.
        module: the attention module, whose processor is replaced.
        role: which of the family's processors serves it ("self", "joint", "single").
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
    """

    grid: tuple[int, int, int]
    batch: int
    timestep: Tensor
    timestep_scale: float = 1000.0
    text_valid: tuple[int, ...] | None = None


class Family(ABC):
    """A model family. It knows Diffusers' class and its processors; it knows nothing of methods."""

    name: ClassVar[str]
    transformer_classes: ClassVar[tuple[str, ...]]
    """Names of the Diffusers transformer classes, so that none is imported before it is needed."""
    stock_processors: ClassVar[tuple[str, ...]]
    """Names of Diffusers' own processors, the only ones that are replaced."""

    @abstractmethod
    def layers(self, model: Any) -> list[AttentionLayer]:
        """The attention layers to take over, in execution order."""

    @abstractmethod
    def processor(self, role: str, engine: Engine) -> Callable[..., Any]:
        """A processor for `role` that computes q, k, v as the stock one does and calls `engine.attend`."""

    @abstractmethod
    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Read the geometry from the bound arguments of `model.forward`."""

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


class AccelProcessor:
    """Base of our attention processors. One instance serves all layers of a role; the layer is the module it is given.

    The two class attributes are those by which Diffusers finds processors in `set_attention_backend` and
    `enable_parallelism`; without them both would skip our layers silently.
    """

    _attention_backend: ClassVar[Any] = None
    _parallel_config: ClassVar[Any] = None

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def dense(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Dense attention as the stock processor runs it. All `[B, N, H, D]`; obeys `set_attention_backend`."""
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        out: Tensor = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return out

    def attend_joint(
        self, attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, text: TextPosition
    ) -> Tensor:
        """Attention over video and text together, all `[B, N, H, D]`, text `before` or `after` the video.

        Returns `[B, N, H * D]`.
        """

        def dense() -> Tensor:
            return self.dense(query, key, value, mask)

        out = self.engine.attend(attn, query, key, value, dense=dense, text=text)
        return out.flatten(2, 3).type_as(query)

    def refuse_parallel(self) -> None:
        """Refuse context parallelism, under which this rank would see only a part of the sequence.

        Raises:
            UnsupportedError: `enable_parallelism` was called and the method is not dense.
        """
        if self._parallel_config is not None and self.engine.method.name != "dense":
            raise UnsupportedError(
                f"method {self.engine.method.name!r} under Diffusers' context parallelism: every rank holds only a "
                "part of the sequence; use method='dense', or parallelise over prompts"
            )
