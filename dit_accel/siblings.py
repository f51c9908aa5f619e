"""Things of a pipeline's transformers that know one another, and stay apart where one transformer is copied alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar


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
