"""Attention under Diffusers' context parallelism: its own exchanges around our engine.

Under Ulysses every process holds all tokens of some heads while it attends, so that a head sees what it sees alone;
where heads compete for blocks (`heads="adaptive"`, `scope="layer"`) they do so with those of their process.
Under ring every process holds all keys and values, as Diffusers gathers them, and its own queries of all heads: that
does for methods whose plan depends on the layout alone, each process taking the rows of its queries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.layout import TextPosition
from dit_accel.shard import HeadShard, TokenShard

if TYPE_CHECKING:
    from dit_accel.engine import Engine
    from dit_accel.families.processor import AttentionInputs
    from dit_accel.methods.base import Method

Dense = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def refusal_of_ring(methods: Iterable[Method], max_error: float | None = None) -> str | None:
    """Why calls cannot be divided by queries, as ring attention does; None: they can.

    Args:
        methods: every method that runs somewhere.
        max_error: budget of the error guard, if there is one.
    """
    for method in sorted(methods, key=lambda method: method.name):
        if reason := method.needs_all_queries:
            return f"method {method.name!r}: {reason}, and under ring attention each process holds a share of them"
    if max_error is not None:
        return "max_error: the guard watches rows of all queries, and under ring attention each process holds a share"
    return None


def attend_ring(engine: Engine, inputs: AttentionInputs, parallel: Any, dense: Dense) -> Tensor:
    """Gather the keys and values of all processes, as Diffusers' ring attention does, and attend with the queries here.

    Args:
        engine, inputs, parallel, dense: as in `attend_ulysses`.

    Returns:
        `[B, N local, H, D]`.

    Raises:
        UnsupportedError: a method whose queries depend on each other, a mask, or ring and Ulysses together.
    """
    from diffusers.hooks import context_parallel

    config = parallel.context_parallel_config
    refused = refusal_of_ring(engine.methods.all(), engine.schedule.max_error)
    if config.ulysses_degree > 1:
        refused = "ring and Ulysses parallelism together"
    if inputs.mask is not None:
        refused = "an attention mask under ring parallelism"
    if refused is not None:
        raise UnsupportedError(f"{refused}; use ContextParallelConfig(ulysses_degree=...) alone, or method='dense'")
    both, mesh = torch.stack([inputs.key, inputs.value]), config._ring_mesh
    if config.ring_anything:
        both = context_parallel.PartitionAnythingSharder.unshard_anything(both, 2, mesh)
    else:
        both = context_parallel.EquipartitionSharder.unshard(both, 2, mesh)
    if inputs.text != "none":
        video = prod(engine.grid)
        index = _joined(video, both.shape[2] - video, config.ring_degree, inputs.text)
        both = both.index_select(2, index.to(both.device))
    query, (key, value) = inputs.query, both
    shard = TokenShard(dist.get_rank(mesh.get_group()), config.ring_degree)

    def run_dense() -> Tensor:
        return dense(query, key, value, None)

    return engine.attend(inputs.attn, query, key, value, dense=run_dense, text=inputs.text, shard=shard)


def attend_ulysses(engine: Engine, inputs: AttentionInputs, parallel: Any, dense: Dense) -> Tensor:
    """Exchange tokens for heads, attend, exchange back.

    Args:
        engine: what attends.
        inputs: of this process: its tokens of all heads, `[B, N local, H, D]`, text and video sharded apart, each in
            equal parts (or as `torch.tensor_split` does); a mask over its keys, or over all.
        parallel: Diffusers' parallel configuration of the processor.
        dense: attention of one process over q, k, v `[B, N, H local, D]` and a mask.

    Returns:
        `[B, N local, H, D]`.
    """
    from diffusers.models import attention_dispatch as diffusers_attention

    config = parallel.context_parallel_config
    group = config._ulysses_mesh.get_group()
    world, rank, total = config.ulysses_degree, dist.get_rank(group), inputs.query.shape[2]

    def forward(_context: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *_: Any, **__: Any) -> Tensor:
        video = prod(engine.grid)
        index = None if inputs.text == "none" else _joined(video, q.shape[1] - video, world, inputs.text).to(q.device)

        def run_dense() -> Tensor:
            out = dense(q, k, v, mask)
            return out if index is None else out.index_select(1, index)

        shard = HeadShard(rank * q.shape[2], q.shape[2], total)
        joined = (q, k, v) if index is None else tuple(x.index_select(1, index) for x in (q, k, v))
        out = engine.attend(inputs.attn, *joined, dense=run_dense, text=inputs.text, reason=inputs.reason, shard=shard)
        return out if index is None else torch.empty_like(out).index_copy_(1, index, out)

    anything = config.ulysses_anything
    exchange = (
        diffusers_attention.TemplatedUlyssesAnythingAttention
        if anything
        else diffusers_attention.TemplatedUlyssesAttention
    )
    qkv = (inputs.query, inputs.key, inputs.value)
    return exchange.apply(*qkv, inputs.mask, 0.0, False, None, False, False, forward, None, parallel)


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
