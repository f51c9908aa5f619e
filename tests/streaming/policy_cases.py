"""Calls, inputs and streams that the tests of attention policies share."""

from __future__ import annotations

import torch
from stream_cases import FRAME, text, tiny_transformer
from torch.nn import functional as F

from dit_accel.pipelines.streaming.attention import AttentionCall
from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.streaming import StreamSettings

GRID = (6, 7)
TOKENS = 42


def call_for(rotary, frames, own, step=0, layer=0, positions=None):
    return AttentionCall(layer, step, own, tuple(frames), tuple(positions or map(float, frames)), GRID, rotary)


def tensors(queries, keys, seed=0, batch=2, heads=2, dim=24):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((queries, 1), (keys, 1), (keys, 1))
    return tuple(torch.randn(batch, n * TOKENS, heads, dim, generator=generator) for n, _ in shapes)


def dense(q, k, v, mask=None):
    out = F.scaled_dot_product_attention(*(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask)
    return out.transpose(1, 2).to(q.dtype)


def drive(policy, count=6, seed=0, runtime=None, **changes):
    runtime = runtime or CausalWan(tiny_transformer())
    settings = StreamSettings(**{"chunk": 2, "window": 8, "sink": 2, "steps": (1000.0, 750.0, 500.0), **changes})
    driver = ChunkDriver(runtime, settings, text(), FRAME, seed, policy=policy)
    return torch.cat([driver.next().latents for _ in range(count)], 2), driver
