"""The transformers of a pipeline; and things of theirs that know one another, unless one of them is copied alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar

from diffusers.utils.torch_utils import unwrap_module
from torch import nn


def transformers_of(pipe: Any) -> dict[str, nn.Module]:
    """The transformers of a Diffusers pipeline by component name, without what compilation wraps around them."""
    found = {name: getattr(pipe, name, None) for name in ("transformer", "transformer_2")}
    return {name: unwrap_module(model) for name, model in found.items() if isinstance(model, nn.Module)}


class _Sibling(Protocol):
    siblings: Siblings[Any]


T = TypeVar("T", bound=_Sibling)


class Siblings(Generic[T]):
    """The members of one pipeline, one of them at first; each has this object as its `siblings`.

    A copy of the pipeline has the copies of all members. A copy of one transformer has that of its own alone.
    """

    def __init__(self, *members: T) -> None:
        self._members = [*members]

    def __iter__(self) -> Iterator[T]:
        return iter(self._members)

    def join(self, member: T) -> None:
        """Take in a member, which leaves its own family."""
        self._members.append(member)
        member.siblings = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Siblings[T]:
        """The family of the copies, without members: each copy joins it by itself."""
        copied: Siblings[T] = memo.setdefault(id(self), Siblings())
        return copied
