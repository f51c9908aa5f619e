"""The compressed memory: its statistics, its place in the softmax, and its bound."""

from __future__ import annotations

import pytest
import torch
from stream_cases import latents, text, tiny_transformer
from torch.nn import functional as F

from dit_accel.errors import PlanError
from dit_accel.kernels import block_attention
from dit_accel.kernels.merge import merge
from dit_accel.kernels.spec import Remainder
from dit_accel.kernels.summary import BlockStatistics, attend_summary
from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.memory import CompressedMemory, Entry, _rotate
from dit_accel.pipelines.streaming.positions import Rotary
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.streaming import StreamSettings

GRID = (5, 7)
TILE = (2, 3)


def frames(count, seed=0, heads=2, dim=24, batch=1, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (count, batch, GRID[0] * GRID[1], heads, dim)
    return spread * torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def statistics(k, v, lengths, order=None, variance=True, groups=1):
    """By definition, block by block. k, v `[B, H, N, D]`."""
    parts = [(a, b) for a, b in zip(k.split(lengths, 2), v.split(lengths, 2), strict=True)]
    mean_k = torch.stack([a.mean(2) for a, _ in parts], 2)
    mean_v = torch.stack([b.mean(2) for _, b in parts], 2)
    var = torch.stack([a.var(2, correction=0) for a, _ in parts], 2)
    each = [torch.einsum("bhtd,bhte->bhde", a - a.mean(2, keepdim=True), b) for a, b in parts]
    size = len(each) // groups
    cross = torch.stack([sum(each[i * size : (i + 1) * size]) for i in range(groups)], 2)
    return BlockStatistics(mean_k, mean_v, torch.tensor(lengths).to(k), var if variance else None, cross)


@pytest.mark.parametrize(("mass", "first_order"), [("mean", "none"), ("diagonal", "none"), ("diagonal", "grouped")])
def test_summary_merged_with_a_window_is_the_remainder_of_the_kernels(mass, first_order):
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, 2, n, 16, generator=generator, dtype=torch.float64) for n in (32, 96, 96))
    size, past = 8, 8
    selected = torch.zeros(4, 12, dtype=torch.bool)
    selected[:, past:] = True
    plan = BlockPlan.from_mask(selected, Blocking.uniform(32, size), Blocking.uniform(96, size))
    remainder = Remainder(mass, first_order, group=4)
    expected = block_attention(q, k, v, plan, remainder=remainder, backend="reference")
    gone = statistics(*(x[:, :, : past * size] for x in (k, v)), [size] * past, groups=2)
    gone = BlockStatistics(
        gone.mean_k, gone.mean_v, gone.tokens, gone.variance if mass == "diagonal" else None,
        gone.cross if first_order == "grouped" else None,
    )  # fmt: skip
    near = BlockPlan.full(Blocking.uniform(32, size), Blocking.uniform(32, size))
    parts = [
        block_attention(q, k[:, :, 64:], v[:, :, 64:], near, return_lse=True, backend="reference"),
        attend_summary(q, gone),
    ]
    torch.testing.assert_close(merge(*zip(*parts, strict=True))[0], expected)


def test_blocks_of_one_token_are_exact_attention():
    q, k, v = (torch.randn(1, 2, 9, 16, dtype=torch.float64) for _ in range(3))
    out, lse = attend_summary(q, statistics(k, v, [1] * 9))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(lse, (q @ k.transpose(-1, -2) / 4).logsumexp(-1))


def test_long_queries_are_cut_and_shapes_are_checked(monkeypatch):
    q, k, v = (torch.randn(1, 2, 33, 16) for _ in range(3))
    blocks = statistics(k, v, [11] * 3)
    whole = attend_summary(q, blocks)
    monkeypatch.setattr("dit_accel.kernels.summary._CHUNK_NUMBERS", 2 * 16 * 5)
    for a, b in zip(attend_summary(q, blocks), whole, strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(PlanError, match="same blocks"):
        BlockStatistics(blocks.mean_k, blocks.mean_v, blocks.tokens[:2])


def test_a_frame_is_summarised_by_tiles():
    memory = CompressedMemory(TILE, cross=True)
    k, v = frames(1, batch=2)
    memory.evict(0, 4, k[0], v[0], GRID)
    got = memory._past[0][0].blocks
    rows, columns = torch.arange(35) // 7, torch.arange(35) % 7
    tile = rows // 2 * 3 + columns // 3
    order = tile.argsort(stable=True)
    expected = statistics(*(x[0].transpose(1, 2)[:, :, order] for x in (k, v)), tile.bincount().tolist())
    for name in ("mean_k", "mean_v", "tokens", "variance", "cross"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=1e-5, rtol=1e-5)


def test_merged_entries_are_the_statistics_of_the_union():
    k, v = (x.double() for x in frames(2))
    heads = [tuple(x.transpose(1, 2) for x in pair) for pair in zip(k, v, strict=True)]
    lengths = [15, 20]
    parts = [Entry(float(i), 1, statistics(*pair, lengths)) for i, pair in enumerate(heads)]
    union = [
        torch.cat([torch.cat([pair[i].split(lengths, 2)[b] for pair in heads], 2) for b in (0, 1)], 2) for i in (0, 1)
    ]
    expected = statistics(*union, [30, 40])
    got = parts[0].joined(parts[1])
    assert (got.frame, got.count) == (0.5, 2)
    for name in ("mean_k", "mean_v", "tokens", "variance", "cross"):
        torch.testing.assert_close(getattr(got.blocks, name), getattr(expected, name))


def test_merging_keeps_the_bound_and_makes_old_time_coarse():
    memory = CompressedMemory((5, 7), entries=6)
    k, v = frames(1)
    for frame in range(200):
        memory.evict(0, frame, k[0], v[0], GRID)
    past = memory._past[0]
    counts = [entry.count for entry in past]
    assert len(past) == 6
    assert sum(counts) == 200
    assert counts[0] > 8 * counts[-1]
    assert [entry.frame for entry in past] == sorted(entry.frame for entry in past)


@pytest.mark.parametrize("positions", ["absolute", "reindex"])
def test_a_memory_of_single_tokens_at_true_distance_is_the_unbounded_cache(positions):
    model, video, prompt = tiny_transformer(), latents(12), text()
    with CausalWan(model) as runtime:
        whole = runtime.branch(StreamSettings(chunk=3, window=None), prompt)
        short = runtime.branch(
            StreamSettings(chunk=3, window=6, positions=positions),
            prompt,
            lambda: CompressedMemory((1, 1), cross=True, reach=1e9),
        )
        for start in range(0, 12, 3):
            part = video[:, :, start : start + 3]
            expected = runtime.forward(whole, part, 0.0, start)
            got = runtime.forward(short, part, 0.0, start)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
        plain = runtime.branch(StreamSettings(chunk=3, window=6), prompt)
        for start in range(0, 12, 3):
            dropped = runtime.forward(plain, video[:, :, start : start + 3], 0.0, start)
    assert (dropped - expected).abs().max() > 1e-3


def test_reach_pulls_the_far_past_in():
    memory = CompressedMemory(reach=4)
    call = type("Call", (), {"frames": (0, 1, 20, 21), "positions": (0.0, 1.0, 2.0, 3.0)})()
    past = [Entry(float(f), 1, None) for f in (5, 17, 19)]
    assert memory._positions(call, past) == (-2.0, -1.0, 1.0)


def test_rotated_statistics_are_those_of_rotated_keys():
    rotary = Rotary(tiny_transformer(layers=1).rope)
    memory = CompressedMemory(TILE, cross=True)
    k, v = frames(3)
    for frame in range(3):
        memory.evict(0, frame, k[frame], v[frame], GRID)
    at = (3.0, 4.5, 9.0)
    got = _rotate(memory._past[0], at, rotary)
    other = CompressedMemory(TILE, cross=True)
    for frame in range(3):
        other.evict(0, frame, rotary.time(k[frame], [at[frame]]), v[frame], GRID)
    blocks = [entry.blocks for entry in other._past[0]]
    torch.testing.assert_close(got.mean_k, torch.cat([x.mean_k for x in blocks], 2), atol=1e-5, rtol=0)
    torch.testing.assert_close(got.cross, torch.cat([x.cross for x in blocks], 2), atol=1e-4, rtol=0)
    variance = torch.cat([x.variance for x in blocks], 2)
    dim = rotary.time_dim
    torch.testing.assert_close(got.variance[..., dim:], variance[..., dim:])
    pairs = [x[..., :dim].unflatten(-1, (-1, 2)).sum(-1) for x in (got.variance, variance)]
    torch.testing.assert_close(*pairs, atol=1e-5, rtol=0)


def stream(runtime, seed=0, **changes):
    settings = StreamSettings(steps=(1000.0,), chunk=1, window=4, sink=1, positions="reindex")
    return ChunkDriver(
        runtime,
        settings,
        text(),
        (4, 6),
        seed,
        policy=lambda: CompressedMemory((1, 2), entries=5, cross=True, **changes),
    )


def test_bytes_are_bounded_and_a_stream_resumes():
    runtime = CausalWan(tiny_transformer(layers=1))
    driver, sizes = stream(runtime), []
    for index in range(60):
        driver.next()
        if index > 20:
            sizes.append(driver.bytes)
    assert len(set(sizes)) == 1
    other = stream(runtime, seed=5)
    other.load_state_dict(driver.state_dict())
    assert torch.equal(other.next().latents, driver.next().latents)
    driver.switch(text(1), "cut")
    assert driver.branches[0].policy.bytes == 0


def test_the_past_changes_the_stream_only_once_there_is_one():
    runtime = CausalWan(tiny_transformer(layers=1))
    settings = StreamSettings(steps=(1000.0,), chunk=1, window=4, sink=1, positions="reindex")
    plain, ours = ChunkDriver(runtime, settings, text(), (4, 6)), stream(runtime)
    same = [torch.equal(plain.next().latents, ours.next().latents) for _ in range(7)]
    assert same == [True] * 4 + [False] * 3
