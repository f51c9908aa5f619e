"""Any Diffusers transformer whose attention goes through Diffusers' dispatcher: LTX-Video, Qwen-Image, Z-Image ...

The model's own processors run unchanged; only the function that they hand q, k and v to is ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import FunctionType
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.errors import UnsupportedError
from dit_accel.families.base import AttentionLayer, Family, ForwardGeometry, patch_grid
from dit_accel.families.processor import UNKNOWN_MASK
from dit_accel.layout import TextPosition

_DISPATCHER = "dispatch_attention_fn"
# Parts of module names by which Diffusers calls attention that is not the video attending itself.
_OTHER_ATTENTION = ("attn2", "cross", "audio", "refiner", "context", "text", "caption", "connector")


@dataclass(frozen=True)
class Facts:
    """What is known of a transformer class.

    Args:
        text: where text stands in the sequence of its attention. None: not known.
        timestep_scale: timestep value of pure noise.
        is_ascending: the timestep rises while noise falls.
    """

    text: TextPosition | None = None
    timestep_scale: float = 1000.0
    is_ascending: bool = False


_FACTS = {
    "LTXVideoTransformer3DModel": Facts("none"),
    "LTX2VideoTransformer3DModel": Facts("none"),
    "QwenImageTransformer2DModel": Facts("before", 1.0),
    # Its image is padded to a multiple of 32 tokens; the padding counts as text.
    "ZImageTransformer2DModel": Facts("after", 1.0, is_ascending=True),
}


class GenericFamily(Family):
    """A transformer that has no family of its own.

    Grid and noise level are read from the forward pass where its arguments say them in a way that Diffusers' models
    share; `notes` says what remains unknown. A call that cannot be understood runs dense, and the report says why.

    Args:
        grid: (frames, height, width) in tokens. Default None: read from the arguments.
        text: where text stands in the sequence. Default None: known for a few classes; for others, calls with more
            tokens than the grid has run dense.
        timestep_scale: timestep value of pure noise; used only when the pipeline announces no noise level. Default
            None: known for a few classes, else 1000.
    """

    name = "generic"
    transformer_classes = ()
    stock_processors = ()

    def __init__(
        self,
        grid: tuple[int, int, int] | None = None,
        text: TextPosition | None = None,
        timestep_scale: float | None = None,
    ) -> None:
        self.grid, self.text, self.timestep_scale = grid, text, timestep_scale
        self.facts = Facts(text, 1000.0 if timestep_scale is None else timestep_scale)

    @staticmethod
    def fits(model: nn.Module) -> bool:
        """Whether the self-attention of `model` goes through the dispatcher."""
        return any(_dispatches(module.processor) for _, module in _self_attention(model))

    def for_model(self, model: Any) -> GenericFamily:
        """A copy that knows what is known of the class of `model`; what was given to the constructor wins."""
        family = GenericFamily(self.grid, self.text, self.timestep_scale)
        known = _FACTS.get(type(model).__name__, family.facts)
        family.facts = replace(
            known,
            text=self.text or known.text,
            timestep_scale=self.timestep_scale or known.timestep_scale,
        )
        return family

    def notes(self, model: Any) -> list[str]:
        """What is taken for granted, and what is not known."""
        name, text = type(model).__name__, self.facts.text
        grid = f"is {self.grid}, as given" if self.grid else "is read from the arguments of every forward pass"
        where = "no text" if text == "none" else f"text {text} the video"
        lines = [f"{name} has no family of its own; the grid {grid}"]
        if text is None:
            lines.append("where text stands is not known: calls with more tokens than the grid run dense")
        else:
            lines.append(f"the sequence has {where}")
        return [*lines, "not known: which frames are conditioning, and any published setting for this model"]

    def layers(self, model: Any) -> list[AttentionLayer]:
        """Self-attention modules in the order of the model, each with a processor of its own.

        Modules are told apart by name: what Diffusers calls cross-attention, refiner, or audio is left alone.

        Raises:
            UnsupportedError: the model has no such module.
        """
        layers = [AttentionLayer(name, module, name) for name, module in _self_attention(model)]
        if not layers:
            raise UnsupportedError(f"{type(model).__name__}: found no self-attention module with a processor")
        return layers

    def check_processor(self, layer: AttentionLayer) -> None:
        """Refuse a processor that does not call Diffusers' dispatcher itself.

        Raises:
            UnsupportedError: names the layer and the processor found.
        """
        if not _dispatches(layer.module.processor):
            raise UnsupportedError(
                f"{layer.name}: expected a processor that calls diffusers' {_DISPATCHER}, found "
                f"{type(layer.module.processor).__name__}, which computes attention in another way"
            )

    def processor(self, layer: AttentionLayer, engine: Engine) -> Callable[..., Any]:
        """A copy of the layer's processor in which the dispatcher is a `DispatchedAttention`."""
        return redirect(layer.module.processor, DispatchedAttention(layer.module, engine, self.facts.text))

    def read(self, model: Any, arguments: dict[str, Any]) -> ForwardGeometry:
        """Grid: as given, else from `num_frames, height, width`, from `img_shapes`, or from the latents' own shape.

        Raises:
            UnsupportedError: the arguments do not say the grid.
        """
        latents = arguments.get("hidden_states", arguments.get("x"))
        batch = len(latents) if latents is not None else 1
        timestep = arguments.get("timestep", arguments.get("t"))
        timestep = torch.zeros(1) if timestep is None else torch.as_tensor(timestep)
        if self.facts.is_ascending:
            timestep = self.facts.timestep_scale - timestep
        grid = self.grid or _read_grid(model, arguments, latents)
        return ForwardGeometry(grid, batch, timestep, self.facts.timestep_scale)


def _read_grid(model: Any, arguments: dict[str, Any], latents: Any) -> tuple[int, int, int]:
    config = model.config
    size, frames = _patch(config)
    named = [n for key in ("num_frames", "height", "width") if isinstance(n := arguments.get(key), int)]
    if len(named) == 3:
        return named[0] // frames, named[1] // size, named[2] // size
    shapes = arguments.get("img_shapes")
    if shapes is not None:
        first = shapes[0] if isinstance(shapes[0], list) else shapes
        if len(first) == 1:
            return first[0]
        rows = sum(f * h * w for f, h, w in first)
        same = all(shape == first[0] for shape in first)
        return (len(first) * first[0][0], *first[0][1:]) if same else (1, 1, rows)
    one = latents[0] if isinstance(latents, (list, tuple)) else latents
    if isinstance(latents, (list, tuple)) and isinstance(one, Tensor) and one.ndim == 4:
        return patch_grid(one[None], (frames, size, size))
    if isinstance(one, Tensor) and one.ndim == 5:
        return patch_grid(one, (frames, size, size))
    if isinstance(one, Tensor) and one.ndim == 4:
        return patch_grid(one[:, :, None], (1, size, size))
    raise UnsupportedError(
        f"{type(model).__name__}: the arguments of its forward pass do not say the token grid; "
        "pass family=GenericFamily(grid=(frames, height, width))"
    )


def _patch(config: Any) -> tuple[int, int]:
    """Patch size in space and in time."""
    size: Any = getattr(config, "patch_size", None) or getattr(config, "all_patch_size", 1)
    if isinstance(size, (list, tuple)):
        return (int(size[-1]), int(size[0])) if len(size) == 3 else (int(size[-1]), 1)
    return int(size), int(getattr(config, "patch_size_t", None) or 1)


def _self_attention(model: nn.Module) -> list[tuple[str, Any]]:
    modules = [(name, module) for name, module in model.named_modules() if hasattr(module, "processor")]
    return [(name, module) for name, module in modules if not any(part in name for part in _OTHER_ATTENTION)]


def _dispatches(processor: Any) -> bool:
    code = getattr(type(processor).__call__, "__code__", None)
    return code is not None and _DISPATCHER in code.co_names and _DISPATCHER in type(processor).__call__.__globals__


def redirect(processor: Any, attend: Callable[..., Tensor]) -> Any:
    """A copy of `processor` whose own code calls `attend` where it says `dispatch_attention_fn`.

    The copy is of a subclass, so that checks of its type hold; the original and its module are not touched.
    """
    cls = type(processor)
    call = cls.__call__
    function = FunctionType(
        call.__code__, {**call.__globals__, _DISPATCHER: attend}, call.__name__, call.__defaults__, call.__closure__
    )
    function.__kwdefaults__ = call.__kwdefaults__
    clone = copy.copy(processor)
    clone.__class__ = type(cls.__name__, (cls,), {"__call__": function, "__module__": cls.__module__})
    return clone


class DispatchedAttention:
    """Stands for `dispatch_attention_fn` in one layer.

    Args:
        module: the attention module.
        engine: the engine to call.
        text: where text stands. None: not known.
    """

    def __init__(self, module: nn.Module, engine: Engine, text: TextPosition | None) -> None:
        self.module, self.engine, self.text = module, engine, text

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any
    ) -> Tensor:
        """Attention of `query`, `key`, `value` `[B, N, H, D]`; the arguments are those of Diffusers' function.

        A mask is read on the host: one of valid keys that stand first becomes lengths.

        Raises:
            UnsupportedError: context parallelism with a method that is not dense.
        """

        def dense() -> Any:
            return dispatch_attention_fn(query, key, value, attn_mask, **rest)

        if key.shape[1] != query.shape[1]:
            return dense()  # attention to something else than the sequence itself
        if self.engine.is_dense:
            return self.engine.attend(self.module, query, key, value, dense=dense)
        if rest.get("parallel_config") is not None:
            raise UnsupportedError(
                f"method {self.engine.method.name!r} under Diffusers' context parallelism: use method='dense'"
            )
        valid, reason = (None, None) if attn_mask is None else _valid_lengths(attn_mask, query.shape[1])
        reason = reason or self._unknown(query, key, rest)
        return self.engine.attend(
            self.module, query, key, value, dense=dense, text=self.text or "none", reason=reason, valid=valid
        )

    def _unknown(self, query: Tensor, key: Tensor, rest: dict[str, Any]) -> str | None:
        """Why the call is not understood, or None."""
        if rest.get("is_causal") or rest.get("scale") is not None or query.shape[2] != key.shape[2]:
            return "the call is causal, scaled, or has fewer key heads than query heads"
        grid = self.engine.state.grid if self.engine.state else (0, 0, 0)
        if self.text is None and query.shape[1] > grid[0] * grid[1] * grid[2]:
            return "where text stands is not known; pass family=GenericFamily(text='before' or 'after')"
        return None


def _valid_lengths(mask: Tensor, tokens: int) -> tuple[tuple[int, ...] | None, str | None]:
    """Valid keys per batch item (None: all) of a boolean mask, or the reason why it has none."""
    if mask.dtype != torch.bool or mask.numel() != mask.shape[0] * tokens or mask.shape[-1] != tokens:
        return None, UNKNOWN_MASK
    rows = mask.reshape(len(mask), tokens)
    lengths, ordered = rows.sum(1).tolist(), bool((rows[:, :-1] >= rows[:, 1:]).all())
    if not ordered or min(lengths) == 0:
        return None, UNKNOWN_MASK
    return (None if min(lengths) == tokens else tuple(lengths)), None
