"""Which parameters of `composed` do not go together, and why."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dit_accel.methods.composed import Composed


def conflicts(method: Composed) -> Iterator[str]:
    """What is wrong with the parameters of `method`, each with what to change."""
    yield from _of_budget(method)
    yield from _of_order(method)
    yield from _of_blocks(method)
    if method.second_order and method.about == "query":
        yield "second_order corrects the mass about the key; about='query' has an exact one"


def _of_budget(method: Composed) -> Iterator[str]:
    if method.density is None and method.mass is None and method.tau is None:
        yield "one of density, mass and tau must say how many blocks are kept"
    if method.tau is not None and (method.density is not None or method.mass is not None):
        yield "tau decides alone: set density and mass to null"
    if method.heads == "adaptive" and (method.density is None or method.mass is not None):
        yield "heads='adaptive' moves blocks between heads at a given density: set density alone"
    if method.heads == "adaptive" and method.scope == "layer":
        yield "scope='layer' moves blocks between heads already: leave heads at 'uniform'"
    if method.densities is not None and not method.keeps_shares:
        yield (
            "densities are shares of the blocks of each head: set mass and tau to null, leave heads at 'uniform' and "
            "scope at 'row' or 'head'"
        )


def _of_order(method: Composed) -> Iterator[str]:
    name, ordering = method.order_, method.ordering
    if ordering.by_content and method.remainder_ == "history":
        yield f"remainder 'history' needs an order that stays; order {name!r} changes every step"
    if ordering.by_content and (method.touching or method.remainder_ == "rectified"):
        yield f"order {name!r} scatters tokens: no block touches another, none can be rectified"
    if method.across_branches and not ordering.serves_branches:
        yield f"across_branches needs an order that branches share: {name!r} is made at every call"
    if method.touching and not ordering.is_static:
        yield "touching needs one order for all heads, got one per head in axes"


def _of_blocks(method: Composed) -> Iterator[str]:
    alike = method.order_ == "tile" or method.touching or method.score == "isolated" or method.remainder_ == "rectified"
    if method.query_block is not None and alike:
        yield (
            "query_block does not go with order 'tile', touching, score 'isolated' or remainder 'rectified', whose "
            "queries and keys share their blocks: set it to null"
        )
