"""The handle that `accelerate()` returns: what is installed, what it did, and the way back."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import nn

from dit_accel.engine import Engine
from dit_accel.families.hoisting import Hoist
from dit_accel.families.tracking import RunStateHook, untrack
from dit_accel.report import Report

# Which handle holds a transformer, so that a second `accelerate()` replaces the first.
ACTIVE: weakref.WeakKeyDictionary[nn.Module, Acceleration] = weakref.WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Installed:
    """One accelerated transformer and what is needed to put it back.

    Args:
        model: the transformer.
        engine: what its attention layers call.
        originals: (attention module, its own processor), one per layer.
        hook: tells the engine step, noise level and guidance branch.
        hoist: puts tokens into an order that all layers share.
    """

    model: nn.Module
    engine: Engine
    originals: tuple[tuple[Any, Any], ...]
    hook: RunStateHook
    hoist: Hoist


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
        for part in installed.values():
            ACTIVE[part.model] = self

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
        where = [f"{name}: {len(part.originals)} attention layers" for name, part in self._installed.items()]
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
            part.engine.reset()

    def remove(self) -> None:
        """Put the original processors back, the very same objects; the report stays. A second call does nothing.

        Of a preset's extras, step cache and compilation go; offload and casting, which store the weights, stay.
        """
        if not self._installed:
            return
        self._last = self.report()
        for part in self._installed.values():
            for module, processor in part.originals:
                module.set_processor(processor)
            untrack(part.model)
            part.hoist.remove()
            ACTIVE.pop(part.model, None)
        self._installed = {}
        self._undo_extras()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()
