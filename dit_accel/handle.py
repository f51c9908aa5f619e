"""The handle that `accelerate()` returns: what is installed, what it did, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from torch import nn

from dit_accel.engine import Engine
from dit_accel.families.hoisting import Hoist
from dit_accel.families.tracking import RunStateHook, untrack
from dit_accel.report.records import Report

# Where a transformer keeps its handle: a table of ours would keep the transformer alive, and not know copies of it.
_HANDLE = "_dit_accel_handle"
# What Diffusers tells processors by `set_attention_backend` and `enable_parallelism`.
_PROCESSOR_SETTINGS = ("_attention_backend", "_parallel_config")


def handle_of(model: nn.Module) -> Acceleration | None:
    """The handle that holds `model`, so that a second `accelerate()` replaces the first; None: it is as it was."""
    held = getattr(model, _HANDLE, None)
    return None if held is None else held.acceleration


def carry_settings(old: Any, new: Any) -> None:
    """Let the attention backend and the parallelism that Diffusers told one processor hold for another."""
    for setting in _PROCESSOR_SETTINGS:
        if hasattr(new, setting):
            setattr(new, setting, getattr(old, setting, None))


class Replaced(NamedTuple):
    """An attention layer: its module, the processor it came with, and ours."""

    module: Any
    stock: Any
    ours: Any

    def put_back(self) -> None:
        """The stock processor again; what Diffusers told ours by `set_attention_backend` and the like holds for it."""
        if self.module.processor is self.ours:
            carry_settings(self.ours, self.stock)
        self.module.set_processor(self.stock)


@dataclass(frozen=True, eq=False)
class Installed:
    """One accelerated transformer and what is needed to put it back.

    Args:
        model: the transformer.
        engine: what its attention layers call.
        layers: the attention layers, with both processors.
        hook: tells the engine step, noise level and guidance branch.
        hoist: puts tokens into an order that all layers share.
    """

    model: nn.Module
    engine: Engine
    layers: tuple[Replaced, ...]
    hook: RunStateHook
    hoist: Hoist


@dataclass(frozen=True)
class _Held:
    """What a transformer keeps of its handle: that of a copied transformer holds no others than copies."""

    acceleration: Acceleration
    name: str

    def __deepcopy__(self, memo: dict[int, Any]) -> _Held:
        copied = _Held(self.acceleration._copy_without_models(memo), self.name)
        memo[id(self)] = copied
        part = copy.deepcopy(self.acceleration._installed[self.name], memo)
        copied.acceleration._installed[self.name] = part
        return copied


class Acceleration:
    """What `accelerate()` returns: a handle, and a context manager that removes itself at the end of its block.

    Args:
        settings: method, parameters, schedule, preset and backend, for summary and report.
        installed: the transformers taken over, by component name.
        undo_extras: switches the preset's extras off.
    """

    def __init__(
        self, settings: dict[str, Any], installed: dict[str, Installed], undo_extras: Callable[[], None]
    ) -> None:
        self.settings = settings
        self._installed = installed
        self._undo_extras = undo_extras
        self._last = Report([], settings)
        for name, part in installed.items():
            setattr(part.model, _HANDLE, _Held(self, name))

    def __deepcopy__(self, memo: dict[int, Any]) -> Acceleration:
        """The handle of copies of all its transformers."""
        copied = self._copy_without_models(memo)
        for part in self._installed.values():
            copy.deepcopy(part.model, memo)  # it enters itself; see `_Held`
        return copied

    def _copy_without_models(self, memo: dict[int, Any]) -> Acceleration:
        copied = memo.get(id(self))
        if copied is None:
            # The extras of the original are its own: what switches them off would do so there.
            copied = memo[id(self)] = Acceleration(copy.deepcopy(self.settings, memo), {}, lambda: None)
            copied._last = copy.deepcopy(self._last, memo)
        return copied

    @property
    def is_active(self) -> bool:
        """Whether the processors are still installed."""
        return bool(self._installed)

    @property
    def engines(self) -> dict[str, Engine]:
        """The engine of each accelerated transformer, by component name."""
        return {name: part.engine for name, part in self._installed.items()}

    def summary(self) -> str:
        """What is switched on and, after a generation, what was computed."""
        what = [
            f"method {self.settings['method']} {self.settings['parameters']}",
            f"schedule {self.settings['schedule']}",
        ]
        if not self._installed:
            return "removed: " + "; ".join(what)
        if self.settings["schedule_2"] is not None:
            what.append(f"schedule of transformer_2 {self.settings['schedule_2']}")
        if self.settings["extras"]:
            what.append(f"extras {self.settings['extras']}")
        where = [f"{name}: {len(part.layers)} attention layers" for name, part in self._installed.items()]
        where += [
            f"{name}: tokens stand in the one order of all its layers from the first block to the last"
            for name, part in self._installed.items()
            if part.engine.standing.is_hoisted
        ]
        where += self.settings.get("notes", [])
        calls = self.report()
        return "\n".join(what + where + ([calls.summary()] if calls.calls else ["no generation yet"]))

    def report(self) -> Report:
        """The attention calls of the latest generation, over all transformers."""
        if not self._installed:
            return self._last
        calls = [call for part in self._installed.values() for call in part.engine.calls]
        pictures = [
            shot for part in self._installed.values() for shots in part.engine.pictures.values() for shot in shots
        ]
        return Report(calls, self.settings, pictures)

    def reset(self) -> None:
        """Forget all state kept between calls; the next forward pass behaves like the first of a new process."""
        for part in self._installed.values():
            part.engine.end()
            part.hook.forget()

    def remove(self) -> None:
        """Put the original processors back, the very same objects; the report stays. A second call does nothing.

        Of a preset's extras, step cache and compilation go; offload and casting, which store the weights, stay.
        """
        if not self._installed:
            return
        self._last = self.report()
        for part in self._installed.values():
            for layer in part.layers:
                layer.put_back()
            untrack(part.model)
            part.hoist.remove()
            part.engine.end()
            delattr(part.model, _HANDLE)
        self._installed = {}
        self._undo_extras()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
