"""Time block attention against dense attention on the CPU: `python samples/bench_cpu_attention.py`.

Every round times dense and each density in turn; the table holds the median of the ratios of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.kernels import block_attention
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.report import environment

DENSITIES = (0.125, 0.25, 0.5, 0.75)


def random_plan(blocks: Blocking, heads: int, density: float) -> BlockPlan:
    """Each row of each head selects the same number of blocks, at random."""
    keep = max(1, round(density * blocks.count))
    chosen = torch.rand(1, heads, blocks.count, blocks.count).topk(keep, dim=-1).indices
    mask = torch.zeros(1, heads, blocks.count, blocks.count, dtype=torch.bool).scatter_(-1, chosen, True)
    return BlockPlan.from_mask(mask, blocks, blocks)


def seconds(run: Callable[[], Tensor]) -> float:
    """Wall-clock time of one call."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def measure(q: Tensor, k: Tensor, v: Tensor, block: int, rounds: int) -> tuple[float, list[float]]:
    """Median dense milliseconds, and per density the median speed-up over dense. q, k, v `[1, H, N, D]`."""
    blocks = Blocking.uniform(q.shape[2], block)
    plans = [random_plan(blocks, q.shape[1], density) for density in DENSITIES]
    runs: list[Callable[[], Tensor]] = [partial(F.scaled_dot_product_attention, q, k, v)]
    runs += [partial(block_attention, q, k, v, plan, backend="torch") for plan in plans]
    for run in runs:
        run()
    times = [[seconds(run) for run in runs] for _ in range(rounds)]
    ratios = [statistics.median(row[0] / row[i] for row in times) for i in range(1, len(runs))]
    return 1e3 * statistics.median(row[0] for row in times), ratios


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--blocks", type=int, nargs="+", default=[64])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(", ".join(f"{name} {value}" for name, value in environment().items()), time.strftime("%Y-%m-%d"))
    print("| D | N | block | dense ms |" + "".join(f" {d:.1%} |" for d in DENSITIES))
    print("|---|---|---|---|" + "---|" * len(DENSITIES))
    for dim in arguments.dims:
        for tokens in arguments.tokens:
            q, k, v = (torch.randn(1, arguments.heads, tokens, dim) for _ in range(3))
            for block in arguments.blocks:
                dense, ratios = measure(q, k, v, block, arguments.rounds)
                cells = "".join(f" {ratio:.2f}x |" for ratio in ratios)
                print(f"| {dim} | {tokens} | {block} | {dense:.0f} |{cells}", flush=True)


if __name__ == "__main__":
    main()
