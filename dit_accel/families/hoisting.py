"""An order that all heads, layers and steps share, applied once: tokens pass the blocks in it, not in raster order.

Blocks treat tokens alike but for attention, so a permutation of the tokens that enter, of their rotary tables and of
whatever else is given per token, undone where they leave, changes nothing but the order in which attention finds them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dit_accel.engine import Engine
from dit_accel.errors import UnsupportedError
from dit_accel.families.base import Family, TokenPorts, bind_forward


class Hoist:
    """Puts the tokens of every forward pass into the order that the engine asks for, and back.

    Nothing happens in a pass for which the engine has no such order, or the family names no ports; nor under context
    parallelism, where each process holds a run of the raster, nor in a model that was compiled whole, whose hooks may
    not run.

    Args:
        model: the transformer.
        family: says where its tokens enter and leave.
        engine: says in which order they shall stand.
        processors: (attention module, our processor) of every layer. While one of them has another, which may take its
            tokens for a raster, nothing happens.
    """

    def __init__(
        self, model: nn.Module, family: Family, engine: Engine, processors: Sequence[tuple[Any, Any]] = ()
    ) -> None:
        self.model, self.family, self.engine, self.processors = model, family, engine, processors
        self._handles: dict[str, tuple[nn.Module, Any]] = {}
        self._ports: TokenPorts | None = None
        self._index: Tensor | None = None
        self._missing: set[str] = set()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Prepare a pass that the engine has begun; returns its arguments, those that are tokens in order."""
        self._index = None
        arguments = bind_forward(self.model, args, kwargs)
        self._ports = self._usable_ports(arguments)
        index = None if self._ports is None else self.engine.standing.wanted(self.engine.running)
        if self._ports is None or index is None:
            return args, kwargs
        self._index, self._missing = index, set(self._ports.enters)
        for path in (*self._ports.enters, *self._ports.leaves):
            self._watch(path)
        changed = {name: self._stand(arguments[name], axis, index) for name, axis in self._ports.arguments.items()}
        names = list(arguments)[1:]
        return (
            tuple(changed.get(name, value) for name, value in zip(names, args, strict=False)),
            kwargs | {name: value for name, value in changed.items() if name in kwargs},
        )

    def remove(self) -> None:
        """Take all hooks off the model."""
        for _, handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._index = None

    def _usable_ports(self, arguments: dict[str, Any]) -> TokenPorts | None:
        model: Any = self.model
        if getattr(model, "_parallel_config", None) is not None or model._compiled_call_impl is not None:
            return None
        if any(module.processor is not processor for module, processor in self.processors):
            return None
        return self.family.token_ports(self.model, arguments)

    def _watch(self, path: str) -> None:
        """Hook the module at `path`; again where an adapter has wrapped it since."""
        module = self.model.get_submodule(path)
        hooked = self._handles.get(path)
        if hooked is not None and hooked[0] is module:
            return
        if hooked is not None:
            hooked[1].remove()
        # A bound method, unlike a closure, is copied with the model that is copied.
        self._handles[path] = (module, module.register_forward_hook(partial(self._passed, path)))

    @torch.compiler.disable
    def _passed(self, path: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        """What a port gives out, in order where tokens enter, in the raster where they leave."""
        if self._index is None or self._ports is None:
            return output
        if path in self._ports.enters:
            self._missing.discard(path)
            if not self._missing:
                self.engine.standing.set(self._index)
            return self._stand(output, self._ports.enters[path], self._index)
        if self._missing:
            raise UnsupportedError(
                f"tokens left the blocks of {type(self.model).__name__} at {path!r}, but did not enter them at "
                f"{sorted(self._missing)}; call accelerate(..., hoist=False)"
            )
        return self._stand(output, self._ports.leaves[path], self._index.argsort())

    def _stand(self, x: Any, axis: int, index: Tensor) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(self._stand(part, axis, index) for part in x)
        if x is None:
            return None
        with self.engine.standing.timed(self.engine.running, x.device):
            return permute_tokens(x, axis, index.to(x.device))


def permute_tokens(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """Gather the tokens of `x` by `index`, int64 `[n]` on its device.

    Args:
        x: any tensor.
        axis: the axis of the tokens, or the first of the axes of a token grid. Tokens before the last n, which are
            text, stay where they are.
        index: a permutation.

    Returns:
        A tensor of the shape of `x`.
    """
    last = axis
    while last < x.ndim - 1 and x.shape[axis : last + 1].numel() < len(index):
        last += 1
    flat = x.flatten(axis, last)
    text = flat.shape[axis] - len(index)
    if text:
        index = torch.cat([torch.arange(text, device=index.device), index + text])
    return flat.index_select(axis, index).view(x.shape)
