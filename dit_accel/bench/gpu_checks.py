"""Checks of every Triton kernel on the device it is to run on: against float64, within twice the error of dense.

Needs torch and Triton alone. A task is a small JSON value, so that it can be handed to another process; `run_check`
turns one into a row. Axis legend: B batch, H heads, N tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.bench.kernels import VARIANTS, pattern_plan
from dit_accel.kernels import Precision, reference, triton_backend
from dit_accel.kernels.aot_cases import AttentionCase, from_json, shipped
from dit_accel.kernels.registry import Request
from dit_accel.kernels.selftest import with_window
from dit_accel.kernels.spec import AttentionCall
from dit_accel.kernels.triton_launch import served_by
from dit_accel.plan import Blocking, BlockPlan

Task = dict[str, Any]
# (tokens beyond whole blocks of 64, whole blocks, density); one short case where the kernels are interpreted.
_LENGTHS = ((1, 10, 0.05), (63, 10, 0.4), (0, 12, 1.0), (0, 64, 0.2))
_LENGTHS_INTERPRETED = ((2, 2, 0.4),)
_NAMES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Beside the rule: levels of 8 bits that lie between two may fall either way, and a tile is skipped or is not.
_SLACK_INT8, _SLACK_FP8, _SLACK_SKIP = 4e-3, 2e-2, 2e-2


@dataclass(frozen=True)
class CheckRow:
    """One line of the table of checks.

    Args:
        kind: "tile", "call", "operation", "addresses" or "compilations".
        name: what was checked, in words.
        tile: of the kernel, where the table of tiles does not choose.
        status: "passed", "failed", or "left out" with the reason in `note`.
        error: largest absolute difference from float64.
        budget: what it may be.
    """

    kind: str
    name: str
    tile: str = ""
    status: str = "passed"
    error: float | None = None
    budget: float | None = None
    note: str = ""


class WrongResult(Exception):
    """A kernel that computes something else than its specification; the message says what."""


def check_tasks(arch: int, interpreted: bool = False) -> list[Task]:
    """Every tile of the table for `arch` with all features it serves, every variant, operation, and the rest."""
    names = ("move", "block means", "block scores", "covariance squares")
    tasks: list[Task] = [{"kind": "operation", "name": name} for name in names]
    tasks += [{"kind": "operation", "name": "rank", "columns": columns} for columns in (40, 1182, 3000, 200_000)]
    for name in VARIANTS:
        for dim, dtype, sizes in (
            (128, "bfloat16", (128, 64)),
            (64, "bfloat16", (64, 64)),
            (72, "float16", (128, 32)),
            (128, "float32", (64, 64)),
        ):
            tasks.append({"kind": "call", "variant": name, "head_dim": dim, "dtype": dtype, "sizes": sizes})
    # What a ranking or an order needs is checked above, by operation.
    cases = [case for case in shipped([arch]) if isinstance(case, AttentionCase)]
    tasks += [{"kind": "tile", "case": case.to_json()} for case in cases]
    if not interpreted:
        tasks += [{"kind": "compilations"}, {"kind": "addresses", "variant": "exact"}]
        tasks += [{"kind": "addresses", "variant": "int8_fp8"}]
    return tasks


def name_of(task: Task) -> CheckRow:
    """The row of a task before it ran."""
    if task["kind"] == "tile":
        case = from_json(task["case"])
        return CheckRow("tile", case.name, case.tile_name)
    if task["kind"] == "call":
        sizes = "x".join(map(str, task["sizes"]))
        return CheckRow("call", f"{task['variant']} {task['dtype']} D{task['head_dim']} blocks {sizes}")
    words = [str(task[key]) for key in ("name", "variant", "columns") if key in task]
    return CheckRow(task["kind"], " ".join(words) or "other lengths, densities and lists compile nothing")


def run_check(task: Task, device: torch.device) -> CheckRow:
    """Run one task.

    Raises:
        Exception: whatever a compiler, a driver or a wrong argument raises; the caller writes it down as a failure.
    """
    row = name_of(task)
    try:
        return _CHECKS[task["kind"]](row, task, device)
    except WrongResult as wrong:
        return replace(row, status="failed", note=str(wrong))


def _tile(row: CheckRow, task: Task, device: torch.device) -> CheckRow:
    case = from_json(task["case"])
    assert isinstance(case, AttentionCase)
    f = case.features
    # The interpreter has no bfloat16.
    dtype = torch.float16 if f.dtype == torch.bfloat16 and device.type == "cpu" else f.dtype
    request = Request(device, dtype, f.head_dim, precision=case.precision, remainder=case.remainder)
    for number, (more, blocks, density) in enumerate(_lengths(device, f.skip)):
        tokens = more + 64 * blocks
        q_blocks, k_blocks = Blocking.uniform(tokens, case.tile.block_m), Blocking.uniform(tokens, case.k_size)
        if not f.uniform:
            k_blocks = _ragged(tokens, case.k_size)
        plan = _random_plan(q_blocks, k_blocks, density, number)
        plan = with_window(plan, f.ball) if f.stride else plan
        with served_by(case.tile):
            row = _compared(row, request, plan, f.has_length, number)
    return row


def _call(row: CheckRow, task: Task, device: torch.device) -> CheckRow:
    remainder, precision = VARIANTS[task["variant"]]
    dtype = _NAMES[task["dtype"]]
    dtype = torch.float16 if dtype == torch.bfloat16 and device.type == "cpu" else dtype
    request = Request(device, dtype, task["head_dim"], remainder=remainder, precision=precision)
    for number, (more, blocks, density) in enumerate(_lengths(device, False)[:3]):
        tokens = more + 64 * blocks
        q_blocks, k_blocks = (Blocking.uniform(tokens, size) for size in task["sizes"])
        plan = _random_plan(q_blocks, k_blocks, density, number)
        row = _compared(row, request, plan, True, number)
    return row


def _lengths(device: torch.device, skips: bool) -> tuple[tuple[int, int, float], ...]:
    if device.type == "cpu":
        return _LENGTHS_INTERPRETED
    # The specification decides tile by tile in Python which ones are skipped.
    return _LENGTHS[:3] if skips else _LENGTHS


def _compared(row: CheckRow, request: Request, plan: BlockPlan, has_length: bool, seed: int) -> CheckRow:
    """Compare one call with the specification, and with itself; keeps the larger share of its budget."""
    reason = triton_backend.BACKEND.why_not(request)
    if reason is not None:
        return replace(row, status="left out", note=reason)
    q, k, v, call = _drawn(request, plan, has_length, seed)
    out, lse = triton_backend.run(q, k, v, call)
    again, _ = triton_backend.run(q, k, v, call)
    if not torch.equal(out, again):
        raise WrongResult(f"two runs on {plan.q_blocks.tokens} tokens differ by {float((out - again).abs().max()):.2g}")
    wide = [x.double() for x in (q, k, v)]
    expected, mass = reference.run(wide[0], wide[1], wide[2], call)
    error, budget = float((out - expected).abs().max()), _budget(q, k, v, call, expected)
    off = float((lse - mass).abs().nan_to_num(0.0).max())
    if not error <= budget or not off <= 0.02 or not torch.equal(lse.isneginf(), mass.isneginf()):
        words = f"{plan.q_blocks.tokens} tokens: output off by {error:.2g} of {budget:.2g}, log-sum-exp by {off:.2g}"
        raise WrongResult(words)
    if row.error is not None and row.budget is not None and error / budget < row.error / row.budget:
        return row
    return replace(row, error=error, budget=budget)


def _budget(q: Tensor, k: Tensor, v: Tensor, call: AttentionCall, expected: Tensor) -> float:
    """Twice the error of dense attention in the same dtype under the same mask, and a unit in the last place."""
    mask = call.plan.to_token_mask()
    if call.kv_len is not None:
        mask = mask & (torch.arange(k.shape[2], device=k.device) < call.kv_len[:, None])[:, None, None]
    k, v = k.nan_to_num(), v.nan_to_num()
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask, scale=call.scale)
    slack = max(torch.finfo(q.dtype).eps, 2e-6) * max(1.0, float(expected.abs().max()))
    precision = call.precision or Precision()
    slack += _SLACK_INT8 * (precision.qk == "int8") + _SLACK_FP8 * (precision.pv == "fp8")
    return 2 * float((dense - exact).abs().nan_to_num(0.0).max()) + slack + _SLACK_SKIP * (precision.skip is not None)


def _drawn(
    request: Request, plan: BlockPlan, has_length: bool, seed: int
) -> tuple[Tensor, Tensor, Tensor, AttentionCall]:
    """Two items of two heads; with lengths the second has fewer real keys, and behind them stand no numbers."""
    generator = torch.Generator().manual_seed(seed)
    tokens = plan.q_blocks.tokens
    size = (2, 2, tokens, request.head_dim)
    q, k, v = (torch.randn(size, generator=generator).to(request.device, request.dtype) for _ in range(3))
    kv_len = None
    if has_length:
        kv_len = torch.tensor([tokens, tokens - tokens // 3], dtype=torch.int32, device=request.device)
        k[1, :, int(kv_len[1]) :] = v[1, :, int(kv_len[1]) :] = torch.nan
    scale = request.head_dim**-0.5
    return q, k, v, AttentionCall(plan.to(request.device), scale, request.remainder, request.precision, kv_len)


def _random_plan(q_blocks: Blocking, k_blocks: Blocking, density: float, seed: int) -> BlockPlan:
    """Every block with the probability `density`, and at least one per row, another one for each head."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(1, 2, q_blocks.count, k_blocks.count, generator=generator)
    mask = (scores < density) | (scores == scores.amin(-1, keepdim=True))
    return BlockPlan.from_mask(mask, q_blocks, k_blocks)


def _ragged(tokens: int, size: int) -> Blocking:
    """Blocks of `size`, but for a short one at each end and one of a single token."""
    lengths = [size // 2, 1]
    while sum(lengths) < tokens:
        lengths.append(min(size, tokens - sum(lengths)))
    return Blocking.from_lengths(lengths, size)


def _operation(row: CheckRow, task: Task, device: torch.device) -> CheckRow:
    from dit_accel.bench.gpu_operations import check_operation

    fault = check_operation(task["name"], task.get("columns", 0), device)
    if fault is not None:
        raise WrongResult(fault)
    return row


def _compilations(row: CheckRow, task: Task, device: torch.device) -> CheckRow:
    from dit_accel.bench.gpu_operations import compiled_kernels

    found = []
    for tokens, density in ((1000, 0.3), (2311, 0.8), (641, 0.1)):
        for name in ("exact", "mixed", "int8"):
            remainder, precision = VARIANTS[name]
            request = Request(device, torch.bfloat16, 128, remainder=remainder, precision=precision)
            plan = _random_plan(Blocking.uniform(tokens, 128), Blocking.uniform(tokens, 64), density, tokens)
            triton_backend.run(*_drawn(request, plan, True, 0))
        found.append(compiled_kernels())
    if found[-1] != found[0]:
        raise WrongResult(f"{found[0]} kernels after the first length, {found[1:]} after others")
    return replace(row, note=f"{found[0]} kernels")


def _addresses(row: CheckRow, task: Task, device: torch.device) -> CheckRow:
    """Tensors of more than 2³¹ numbers each, of which the first and the last queries are looked at."""
    heads, dim, block = 16, 128, 128
    tokens = 2**31 // (heads * dim) + 12_345
    needed = 6 * 2 * heads * dim * tokens
    if torch.cuda.mem_get_info(device)[0] < needed:
        return replace(row, status="left out", note=f"it takes {needed >> 30} GiB of free memory")
    q, k, v = (torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16) for _ in range(3))
    plan = pattern_plan("window", tokens, (block, 64), 1, 0.0003, device, 0)
    _, precision = VARIANTS[task["variant"]]
    out, _ = triton_backend.run(q, k, v, AttentionCall(plan, dim**-0.5, None, precision))
    limit, error = 0.02 if precision is None else 0.06, 0.0
    for head in (0, heads - 1):
        for index in (0, plan.q_blocks.count - 1):
            rows = slice(int(plan.q_blocks.starts[index]), int(plan.q_blocks.starts[index + 1]))
            chosen = plan.indices[0, 0, index, : int(plan.counts[0, 0, index])]
            keys = (chosen.long()[:, None] * 64 + torch.arange(64, device=device)).flatten()
            keys = keys[keys < tokens]
            here = slice(head, head + 1)
            wide = [x[:, here, at].double() for x, at in ((q, rows), (k, keys), (v, keys))]
            wanted = F.scaled_dot_product_attention(wide[0], wide[1], wide[2])
            error = max(error, float((out[:, here, rows] - wanted).abs().max()))
    if not error <= limit:
        raise WrongResult(f"off by {error:.2g} of {limit:.2g} where addresses exceed 2³¹")
    return replace(row, error=error, budget=limit)


_CHECKS: dict[str, Callable[[CheckRow, Task, torch.device], CheckRow]] = {
    "tile": _tile,
    "call": _call,
    "operation": _operation,
    "compilations": _compilations,
    "addresses": _addresses,
}
