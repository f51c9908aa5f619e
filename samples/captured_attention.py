"""Attention calls to study methods on: q, k, v of the small model as it generates, and synthetic fields."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

import dit_accel
from dit_accel.generation import call_pipeline
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.presets import Generation
from dit_accel.state import CallContext

T = TypeVar("T")
_FIELD_GRID = (8, 16, 16)


@dataclass(frozen=True)
class Call:
    """One attention call: what it is, its geometry, and q, k, v `[1, H, N, D]` in the raster."""

    name: str
    layer: int
    step: int
    layout: TokenLayout
    qkv: tuple[Tensor, Tensor, Tensor]


class _Recorder(Method):
    """Keeps q, k, v of some steps; at full density, so that the call itself runs dense."""

    name: ClassVar[str] = "recorder"
    source: ClassVar[str] = "this project"

    steps: tuple[int, ...]
    _calls: list[Call] = PrivateAttr(default_factory=list)

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Keep them; the raster."""
        if call.step in self.steps and call.branch != "uncond":
            name = f"layer {call.layer}, step {call.step}"
            self._calls.append(Call(name, call.layer, call.step, call.layout, (q.clone(), k.clone(), v.clone())))
        return None

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """Everything."""
        blocks = call.layout.blocks(64)
        return BlockPlan.full(blocks, blocks, q.device)


def clocked(run: Callable[[], T]) -> tuple[float, T]:
    """CPU milliseconds of one call, and what it returns: other programs on the machine do not count."""
    begun = time.process_time()
    value = run()
    return 1e3 * (time.process_time() - begun), value


def captured(pipe: Any, generation: Generation, prompt: str, seed: int, steps: Collection[int]) -> list[Call]:
    """The self-attention calls of all layers at some steps of one generation, without those of the negative prompt."""
    recorder = _Recorder(steps=tuple(steps))
    with dit_accel.accelerate(pipe, method=recorder):
        call_pipeline(pipe, generation, prompt, seed)
    return recorder._calls


def synthetic(seed: int = 0, heads: int = 2, dim: int = 64) -> list[Call]:
    """Random fields over a video: smooth, rough, and three that break careless arithmetic."""
    generator = torch.Generator().manual_seed(seed)
    layout = TokenLayout(_FIELD_GRID)

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, heads, *shape, generator=generator)

    def field(noise: float) -> tuple[Tensor, Tensor, Tensor]:
        waves, at = draw(3, 3, dim), layout.coordinates.float() / 6
        q, k, v = (
            2 * torch.sin(at @ waves[:, :, i] + draw(1, dim)) + noise * draw(layout.video, dim) for i in range(3)
        )
        return q, k, v

    smooth, rough = field(0.3), field(1.5)
    outlier = tuple(x.clone() for x in field(0.5))
    outlier[1][..., 7] += 40 * draw(layout.video).sign()
    outlier[0][..., 7] = 0.3 * draw(layout.video)
    q, k, v = field(0.5)
    large = (q * 80 * dim**0.5 / (q @ k.transpose(-1, -2)).abs().max(), k, v)
    same = (q, k[:, :, :1].expand_as(k).contiguous(), v)
    fields = {"smooth": smooth, "rough": rough, "outlier channel": outlier, "logits to 80": large, "equal keys": same}
    return [Call(name, 0, 0, layout, (x[0], x[1], x[2])) for name, x in fields.items()]
