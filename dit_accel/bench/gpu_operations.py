"""The operations around attention on a device: whether they are right, and how many kernels were compiled for them."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from dit_accel.kernels.block_statistics import block_spread_in_triton, covariance_squares_in_triton
from dit_accel.kernels.moving import move
from dit_accel.kernels.operations import why_not
from dit_accel.kernels.ranking import DigitRanking, SortedRanking, rank
from dit_accel.layout import TokenLayout
from dit_accel.plan import Blocking
from dit_accel.selection.samples import largest_weights, sampled_scores
from dit_accel.selection.scores import antidiagonal_scores, block_mass, subblock_scores

_MODULES = (
    "triton_attention",
    "triton_ranking",
    "triton_scores",
    "triton_selection",
    "triton_statistics",
    "triton_summaries",
)


def check_operation(name: str, columns: int, device: torch.device) -> str | None:
    """What is wrong with an operation at a realistic size, in one clause; None when nothing is.

    Args:
        name: as in `dit_accel.kernels.operations`.
        columns: candidates of a row, for "rank".
        device: where.
    """
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    reason = why_not(name, device, dtype)
    if reason is not None:
        return reason
    tokens = 300 if device.type == "cpu" else 20_000
    generator = torch.Generator().manual_seed(1)
    if name == "rank":
        return _ranks(torch.randn(1, 3, 5, columns, generator=generator).to(device))
    k, v = (torch.randn(2, 3, tokens + 7, 72, generator=generator).to(device, dtype) for _ in range(2))
    if name == "move":
        index = torch.rand(2, 3, tokens + 7, generator=generator).argsort(-1).to(device)
        moved = move(k, index, scatter=False)
        right = torch.equal(moved, k.gather(2, index.unsqueeze(-1).expand_as(k)))
        return None if right and torch.equal(move(moved, index, scatter=True), k) else "tokens in the wrong place"
    blocks = Blocking.uniform(tokens + 7, 64)
    if name == "block scores":
        return _scores(k, v, blocks, (tokens + 7, tokens // 2))
    lengths = torch.tensor([tokens + 7, tokens // 2], dtype=torch.int32, device=device)
    return _statistics(name, k, v, blocks, lengths)


def _ranks(scores: Tensor) -> str | None:
    """Rows with many ties, forced candidates, and everything from none to all kept."""
    scores = (4 * scores).round()
    first = scores.abs() > 12
    counts = torch.arange(15, device=scores.device).view(1, 3, 5) * scores.shape[-1] // 14
    plain, fast = SortedRanking(scores, first), rank(scores, first)
    for ranking in (fast, DigitRanking(scores, first)):
        if not torch.equal(plain.leading(counts), ranking.leading(counts)):
            return "other candidates than the best"
    shares, mass = scores.softmax(-1), torch.tensor(0.7, dtype=torch.float64, device=scores.device)
    same = torch.equal(plain.reaching(shares, mass, "keep"), fast.reaching(shares, mass, "keep"))
    return None if same else "shares are counted wrongly"


def _scores(q: Tensor, k: Tensor, blocks: Blocking, valid: tuple[int, ...]) -> str | None:
    """Every kind of score against torch in float64; 8 does not divide the length of either item."""
    layout = TokenLayout((1, 1, q.shape[2]), valid=valid)

    def sampled(q: Tensor, k: Tensor) -> Tensor:
        generator = torch.Generator(q.device).manual_seed(0)
        return sampled_scores(q, k, blocks, blocks, layout, (8, 16), generator)

    for name, scores in {
        "antidiagonal": lambda q, k: antidiagonal_scores(q, k, blocks, blocks, layout, 8),
        "sub-block": lambda q, k: subblock_scores(q, k, blocks, blocks, layout, 2, 4),
        "sampled": sampled,
    }.items():
        got, wanted = scores(q, k).double(), scores(q.double(), k.double())
        # Below this a mass is 0 in fp32.
        close = (got.clamp(min=-80) - wanted.clamp(min=-80)).abs().max()
        if not torch.equal(got.isneginf(), wanted.isneginf()) or not float(close) < 2e-3:
            return f"{name} scores are off by {float(close):.2g}"
    wide = (q.double(), k.double())
    weights = [largest_weights(x, y, blocks, blocks, layout, 8) for x, y in ((q, k), wide)]
    if not float((weights[0] - weights[1]).abs().max()) < 2e-3:
        return "largest weights are wrong"
    few = Blocking.uniform(min(q.shape[2], 1000), 64)
    short = [[x[:, :, : few.tokens] for x in pair] for pair in ((q, k), wide)]
    mass = [block_mass(x, y, few, few, TokenLayout((1, 1, few.tokens)))[0] for x, y in short]
    return None if float((mass[0] - mass[1]).abs().max()) < 2e-2 else "the mass of blocks is wrong"


def _statistics(name: str, k: Tensor, v: Tensor, blocks: Blocking, lengths: Tensor) -> str | None:
    """Means with variances or squares against float64, block by block."""
    if name == "block means":
        means, second = block_spread_in_triton(k, blocks, lengths)
    else:
        means, second = covariance_squares_in_triton(k, v, blocks, lengths)
    for item, length in enumerate(lengths.tolist()):
        for j in range(0, blocks.count, max(1, blocks.count // 20)):
            inside = slice(int(blocks.starts[j]), max(int(blocks.starts[j]), min(int(blocks.starts[j + 1]), length)))
            keys, values = k[item, :, inside].double(), v[item, :, inside].double()
            mean = keys.sum(1) / max(1, keys.shape[1])
            delta = keys - mean.unsqueeze(1)
            if name == "block means":
                wanted, limit = delta.square().sum(1) / max(1, keys.shape[1]), 1e-3
            else:
                wanted = (delta.transpose(-1, -2) @ values).square().sum(-1)
                limit = 0.02 * float(wanted.max()) + 1e-6
            wrong = float((means[item, :, j] - mean).abs().max()) > 1e-4
            if wrong or float((second[item, :, j] - wanted).abs().max()) > limit:
                return f"wrong in block {j} of item {item}"
    return None


def compiled_kernels() -> int:
    """How many variants of this package's kernels this process has compiled so far."""
    from triton.runtime.jit import JITFunction

    modules = [importlib.import_module(f"dit_accel.kernels.{name}") for name in _MODULES]
    kernels = {id(x): x for module in modules for x in vars(module).values() if isinstance(x, JITFunction)}
    # The first entry of what a device has is its table of compiled variants.
    return sum(len(cache[0]) for kernel in kernels.values() for cache in kernel.device_caches.values())
