"""Errors that name the place, what was expected, what was got, and what to change."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DitAccelError(Exception):
    """Base class of every error this library raises on purpose. The command line prints it as one line."""


class ConfigError(DitAccelError, ValueError):
    """A preset, schedule or method parameter is wrong.

    Args:
        path: dotted path of the offending value, for example ``method.parameters.density``.
        message: what was expected and what was got.
    """

    def __init__(self, path: str, message: str) -> None:
        self.path = path
        self.message = message
        super().__init__(f"{path}: {message}")


class UnsupportedError(DitAccelError, RuntimeError):
    """A request that is understood but cannot be served here; the message says why and what to use instead."""


class PlanError(DitAccelError, ValueError):
    """A layout, order or block plan that is inconsistent with itself or with the tensors it is used on."""


def near_matches(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean ...?"`` for names close to `name`, else the list of known names."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "; known: " + ", ".join(known)
