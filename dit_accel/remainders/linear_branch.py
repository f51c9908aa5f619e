"""Linear attention over key blocks, with a softmax over the channels as feature map (arXiv 2509.24006).

Axis legend: B batch, H heads, N tokens, D head size, nq / nk query / key blocks.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.plan import BlockPlan
from dit_accel.selection import gather_blocks
from dit_accel.selection.pooling import working

Over = Literal["unselected", "all"]
_EPSILON = 1e-5  # of the published code, in the denominator over all keys


def linear_attention(q: Tensor, k: Tensor, v: Tensor, plan: BlockPlan, layout: TokenLayout, over: Over) -> Tensor:
    """φ(q)·Σ φ(k) vᵀ / φ(q)·Σ φ(k) over the keys of some blocks, fp32 (fp64 for fp64) `[B, H, N, D]`.

    Args:
        q, k, v: `[B, H, N, D]`.
        plan: the selected blocks.
        layout: token geometry; padding does not count.
        over: "unselected": the blocks that the query block did not select, and 0 where there are none; "all".
    """
    blocks, features = plan.k_blocks, working(q).softmax(-1)
    keys, real = gather_blocks(k, blocks, layout.valid)
    keys = keys.softmax(-1) * real[:, None, :, :, None]
    values, _ = gather_blocks(v, blocks, layout.valid)
    h, z = keys.transpose(-1, -2) @ values, keys.sum(3)
    if over == "all":
        return features @ h.sum(2) / (features @ z.sum(2).unsqueeze(-1) + _EPSILON)
    rest = (~plan.to_mask()).to(h.dtype).expand(*h.shape[:2], -1, -1)
    out = torch.zeros_like(features)
    for row, (start, length) in enumerate(
        zip(plan.q_blocks.starts.tolist(), plan.q_blocks.lengths.tolist(), strict=False)
    ):
        here, weight = features[:, :, start : start + length], rest[:, :, row].unsqueeze(2)
        top = here @ (weight @ h.flatten(-2)).unflatten(-1, h.shape[-2:]).squeeze(2)
        mass = (here * (weight @ z)).sum(-1, keepdim=True)
        out[:, :, start : start + length] = torch.where(mass > 0, top / mass.clamp(min=1e-30), 0.0)
    return out


@lru_cache(maxsize=4)
def load_projections(path: str) -> dict[int, tuple[Tensor, Tensor]]:
    """Weight `[D, D]` and bias `[D]` of each layer's projection, fp32, from a safetensors file.

    Names hold the number of the layer and end in "proj_l.weight" and "proj_l.bias"; everything else is left alone, so
    that a whole checkpoint will do.

    Raises:
        ConfigError: there is no such file, or no such pair of tensors in it.
    """
    if not Path(path).is_file():
        raise ConfigError("method.sla.projections", f"{path}: there is no such file")
    found: dict[int, dict[str, Tensor]] = {}
    for name, tensor in load_file(path).items():
        match = re.search(r"(\d+)\.(?:.*\.)?proj_l\.(weight|bias)$", name)
        if match is not None:
            found.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    if not found or any(len(pair) < 2 for pair in found.values()):
        raise ConfigError("method.sla.projections", f"{path}: expected tensors '<layer>...proj_l.weight' and '.bias'")
    return {layer: (pair["weight"], pair["bias"]) for layer, pair in found.items()}
