"""Plans as safetensors files."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from dit_accel.errors import PlanError
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate

_FORMAT = "dit_accel.plan/1"


def save_plan(plan: BlockPlan, path: str | Path) -> None:
    """Write `plan` to `path` as safetensors, under a temporary name that is renamed when complete."""
    tensors = {
        "q_starts": plan.q_blocks.starts,
        "k_starts": plan.k_blocks.starts,
        "indices": plan.indices,
        "counts": plan.counts,
    }
    meta = {"format": _FORMAT, "sizes": json.dumps([plan.q_blocks.size, plan.k_blocks.size])}
    if plan.predicate is not None and plan.full_counts is not None:
        box = plan.predicate
        tensors |= {"full_counts": plan.full_counts, "lower": box.lower, "upper": box.upper}
        tensors |= {"coordinates": box.coordinates} | ({} if box.ball is None else {"ball": box.ball})
        meta["stride"] = json.dumps(box.stride)
    temporary = f"{path}.tmp"
    save_file({name: t.cpu().clone().contiguous() for name, t in tensors.items()}, temporary, metadata=meta)
    os.replace(temporary, path)


def load_plan(path: str | Path) -> BlockPlan:
    """Read a plan from `path` and validate it.

    Raises:
        PlanError: the file is not a plan, or its contents are inconsistent.
    """
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata() or {}
        if meta.get("format") != _FORMAT:
            raise PlanError(f"{path}: expected a {_FORMAT} file, got format {meta.get('format')!r}")
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    q_size, k_size = json.loads(meta["sizes"])
    predicate = None
    if "stride" in meta:
        stride = tuple(json.loads(meta["stride"]))
        predicate = BoxPredicate(
            tensors["lower"], tensors["upper"], tensors["coordinates"], stride, tensors.get("ball")
        )
    return BlockPlan(
        Blocking(tensors["q_starts"], q_size),
        Blocking(tensors["k_starts"], k_size),
        tensors["indices"],
        tensors["counts"],
        tensors.get("full_counts"),
        predicate,
    ).validate()
