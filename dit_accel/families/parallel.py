"""Attention under Diffusers' context parallelism: its own Ulysses exchange around our engine.

Between the two exchanges every process holds all tokens of some heads, so that a method sees what it sees alone.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.layout import TextPosition

if TYPE_CHECKING:
    from dit_accel.engine import Engine


def refuse_ring(engine: Engine, parallel: Any) -> None:
    """Refuse ring parallelism, under which no process ever holds all keys.

    Raises:
        UnsupportedError: names the method and what to use instead.
    """
    if parallel.context_parallel_config.ring_degree > 1 and not engine.is_dense:
        raise UnsupportedError(
            f"method {engine.method.name!r} under ring parallelism: no process holds all keys to select from; use "
            "ContextParallelConfig(ulysses_degree=...) with ring_degree=1, or method='dense'"
        )


def attend_ulysses(
    engine: Engine,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    parallel: Any,
    dense: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor],
    mask: Tensor | None,
    text: TextPosition,
    reason: str | None,
) -> Tensor:
    """Exchange tokens for heads, attend, exchange back.

    Args:
        engine, module, text, reason: as in `Engine.attend`.
        query, key, value: this process' tokens of all heads, `[B, N local, H, D]`; text and video are sharded
            apart, each in equal parts (or as `torch.tensor_split` does).
        parallel: Diffusers' parallel configuration of the processor.
        dense: attention of one process over q, k, v `[B, N, H local, D]` and a mask.
        mask: mask of the stock processor over this process' keys, or over all keys; None: none.

    Returns:
        `[B, N local, H, D]`.
    """
    from diffusers.models import attention_dispatch as diffusers_attention

    from dit_accel.engine import HeadShard

    config = parallel.context_parallel_config
    group = config._ulysses_mesh.get_group()
    world, rank, total = config.ulysses_degree, dist.get_rank(group), query.shape[2]

    def forward(_context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any, **__: Any) -> Tensor:
        video = prod(engine.grid)
        index = None if text == "none" else _joined(video, q.shape[1] - video, world, text).to(q.device)

        def run_dense() -> Tensor:
            out = dense(q, k, v, mask)
            return out if index is None else out.index_select(1, index)

        shard = HeadShard(rank * q.shape[2], q.shape[2], total)
        joined = (q, k, v) if index is None else tuple(x.index_select(1, index) for x in (q, k, v))
        out = engine.attend(module, *joined, dense=run_dense, text=text, reason=reason, shard=shard)
        return out if index is None else torch.empty_like(out).index_copy_(1, index, out)

    anything = config.ulysses_anything
    exchange = (
        diffusers_attention.TemplatedUlyssesAnythingAttention
        if anything
        else diffusers_attention.TemplatedUlyssesAttention
    )
    return exchange.apply(query, key, value, mask, 0.0, False, None, False, False, forward, None, parallel)


def _joined(video: int, text: int, world: int, position: TextPosition) -> Tensor:
    """Where the tokens of the joint sequence stand after the exchange, which puts the processes' parts in a row.

    Every part is text and video of one process, in the order of the joint sequence.
    """
    sizes = {
        "text": [len(x) for x in torch.arange(text).tensor_split(world)],
        "video": [len(x) for x in torch.arange(video).tensor_split(world)],
    }
    kinds = ("text", "video") if position == "before" else ("video", "text")
    where: dict[str, list[Tensor]] = {"text": [], "video": []}
    start = 0
    for process in range(world):
        for kind in kinds:
            where[kind].append(torch.arange(start, start + sizes[kind][process]))
            start += sizes[kind][process]
    return torch.cat([x for kind in kinds for x in where[kind]])
