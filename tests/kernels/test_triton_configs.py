"""The table of tiles, what its choice depends on, and the gate that compiles it ahead of time with no GPU."""

from __future__ import annotations

import inspect
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kernel_cases import random_plan, tensors, uniform

from dit_accel.errors import UnsupportedError
from dit_accel.kernels import Precision, Remainder, backends, block_attention, triton_backend, triton_launch
from dit_accel.kernels.aot import Resources, compile_cases
from dit_accel.kernels.aot_cases import (
    AttentionCase,
    HelperCase,
    features_shipped,
    from_json,
    helper_launches,
    recording,
    shipped,
)
from dit_accel.kernels.registry import Request
from dit_accel.kernels.spec import AttentionCall
from dit_accel.kernels.triton_configs import (
    FROM_FP8,
    NO_SKIP,
    TILES,
    Features,
    Tile,
    architecture,
    choose_tile,
    next_power_of_two,
)
from dit_accel.plan import Blocking, BlockPlan

GOOD = Resources(168, 0, 100_000, 12, ("wgmma", "TMA"))
SPECIALIZED = AttentionCase(90, TILES[90][128][0], Features(128, torch.bfloat16))


def test_there_are_at_most_four_tiles_per_architecture_and_head_size():
    for sizes in TILES.values():
        for tiles in sizes.values():
            assert len([tile for tile in tiles if not tile.fp32]) <= 4
            assert len([tile for tile in tiles if tile.fp32]) == 1


@pytest.mark.parametrize("arch", TILES)
@pytest.mark.parametrize("dim", [1, 40, 64, 72, 128, 200, 256])
def test_every_call_finds_a_tile(arch, dim):
    for dtype, stride, rest, order, uniform_blocks, aligned, (q_size, k_size) in itertools.product(
        [torch.float16, torch.float32],
        [(), (1, 2)],
        [0, 1, 2],
        [0, 1, 2],
        [True, False],
        [True, False],
        [(64, 64), (128, 64), (1, 1), (300, 48)],
    ):
        features = Features(dim, dtype, uniform_blocks, False, stride, False, rest, order, aligned)
        tile = choose_tile(arch, features, q_size, k_size)
        assert tile.fp32 == (dtype == torch.float32)
        assert tile.block_m <= max(16, next_power_of_two(q_size))
        assert tile.block_n <= max(16, next_power_of_two(k_size))
        if tile.tma:
            assert uniform_blocks
            assert aligned
            assert not stride
            assert k_size % tile.block_n == 0


def test_a_large_query_block_takes_the_specialised_tile_on_hopper():
    features = Features(128, torch.bfloat16, rest=1)
    assert choose_tile(90, features, 128, 64).specialize
    assert not choose_tile(90, features, 64, 64).specialize
    assert not choose_tile(90, replace(features, first_order=1), 128, 64).specialize
    assert not choose_tile(80, features, 128, 64).tma


@pytest.mark.parametrize(
    ("capability", "expected"), [((7, 5), None), ((8, 0), 80), ((8, 6), 80), ((8, 9), 89), ((9, 0), 90), ((10, 3), 100)]
)
def test_a_device_takes_the_newest_architecture_it_is_not_older_than(capability, expected):
    assert architecture(capability) == expected


def test_the_choice_and_the_kernel_know_neither_lengths_nor_counts():
    """A value that Triton specialises on, or that chooses the tile, would compile again when it changes."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from dit_accel.kernels.triton_attention import attention
    from dit_accel.kernels.triton_ranking import digit_counts, keep_leading
    from dit_accel.kernels.triton_scores import partial_means, pool_slots, slot_scores
    from dit_accel.kernels.triton_selection import leading, move_rows, reaching
    from dit_accel.kernels.triton_statistics import quantize, quantize_values, statistics, value_range
    from dit_accel.kernels.triton_summaries import add_mixed, block_shares, seen_by_means

    assert set(inspect.signature(choose_tile).parameters) == {"arch", "features", "q_size", "k_size"}
    # Strides of tensors, and the factor on the logits, follow from the model; everything else varies.
    fixed = {f"{name}_{axis}" for name in ("q", "k", "v", "out", "x", "part") for axis in "bhn"} | {"scale", "skip"}
    helpers = (leading, reaching, digit_counts, keep_leading, move_rows, add_mixed, block_shares, seen_by_means)
    helpers += (partial_means, slot_scores, pool_slots)
    first = ("scale", "k_b", "x_b", "v_b", "columns", "at_b")
    for kernel in (attention, statistics, quantize, value_range, quantize_values, *helpers):
        names = [p.name for p in kernel.params]
        pointers = set(names[: min(names.index(n) for n in first if n in names)])
        for parameter in kernel.params:
            if not parameter.is_constexpr and parameter.name not in fixed | pointers:
                assert parameter.do_not_specialize, parameter.name


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"spilled": 12}, "spills 12 bytes"),
        ({"shared": 300_000}, "needs 300000 bytes of shared memory, the device has 232448"),
        ({"instructions": ("mma.sync", "TMA")}, "does not use wgmma"),
        ({"instructions": ("wgmma",)}, "not asynchronous"),
        ({"warps": 4}, "not specialised"),
        ({"failure": "RuntimeError: no"}, "does not compile: RuntimeError: no"),
    ],
)
def test_the_gate_names_the_fault(changed, words):
    assert GOOD.fault(SPECIALIZED) is None
    assert words in replace(GOOD, **changed).fault(SPECIALIZED)


def test_every_tile_and_every_kernel_is_in_the_gate():
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from triton.runtime.jit import JITFunction

    from dit_accel.kernels import (
        triton_attention,
        triton_ranking,
        triton_scores,
        triton_selection,
        triton_statistics,
        triton_summaries,
    )

    modules = (triton_attention, triton_ranking, triton_scores, triton_selection, triton_statistics, triton_summaries)

    for arch, dim in itertools.product(TILES, (64, 128)):
        cases = shipped([arch], [dim])
        attention = [case for case in cases if isinstance(case, AttentionCase)]
        features = {
            f for f in features_shipped(dim) if not (f.skip and arch == NO_SKIP) and not (f.fp8 and arch < FROM_FP8)
        }
        assert {case.features for case in attention} == features
        assert len({(case.tile.tma, case.tile.specialize, case.tile.fp32, case.tile.warps) for case in attention}) > 1
        assert all(from_json(case.to_json()) == case for case in cases)
        kernels = {case.launch().kernel for case in cases}
        for module in modules:
            launched = {x for x in vars(module).values() if isinstance(x, JITFunction) and x.do_not_specialize}
            of_fp8 = {triton_statistics.value_range, triton_statistics.quantize_values}
            assert launched - (of_fp8 if arch < FROM_FP8 else set()) <= kernels, module.__name__


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"remainder": Remainder(about="query", first_order="mixed")},
        {"precision": Precision("int8")},
        {"precision": Precision("int8", pv="fp8")},
        {"kv_len": torch.empty(1, dtype=torch.int64, device="meta")},
    ],
    ids=["exact", "about", "int8", "int8_fp8", "lengths"],
)
def test_a_call_launches_nothing_that_the_gate_does_not_compile(monkeypatch, extra):
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    monkeypatch.setattr(triton_launch, "_architecture", lambda device: 90)
    q, k, v = (torch.empty(1, 3, 640, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    blocks = Blocking.uniform(640, 64)
    with recording() as launches:
        triton_backend.run(q, k, v, AttentionCall(BlockPlan.full(blocks, blocks, "meta"), 0.1, **extra))

    def told(launch):
        """Kernel and compile-time arguments, but for those on which only the shape of the last blocks depends."""
        free = ("HAS_LENGTH",)
        return launch.kernel, frozenset((k, v) for k, v in launch.options.items() if k.isupper() and k not in free)

    compiled = {told(case.launch()) for case in shipped([90], [128])}
    assert launches
    assert {told(launch) for launch in launches} <= compiled


def test_a_tile_that_cannot_compile_is_a_fault_and_not_an_exception():
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    ((_, found),) = compile_cases([replace(SPECIALIZED, tile=Tile(24, 16, 4, 1))], timeout=3600)
    assert "does not compile" in found.fault(SPECIALIZED)


def test_shipped_kernels_of_every_architecture_compile_without_spills():
    """One per architecture; `samples/compile_kernels.py` compiles all of them."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    half, narrow = Features(128, torch.bfloat16), Features(64, torch.bfloat16)
    helpers = {made.name: place for place, made in enumerate(helper_launches(128, torch.bfloat16))}
    cases = [
        AttentionCase(80, TILES[80][128][0], half),
        AttentionCase(89, TILES[89][64][2], replace(narrow, rest=1, first_order=1)),
        AttentionCase(90, TILES[90][128][0], replace(half, rest=1)),
        AttentionCase(90, TILES[90][128][3], replace(half, rest=3)),
        AttentionCase(100, TILES[100][128][0], half),
        AttentionCase(100, TILES[100][64][3], replace(narrow, stride=(1, 1, 1), ball=True)),
        AttentionCase(120, TILES[120][128][1], replace(half, uniform=False, has_length=True)),
        AttentionCase(120, TILES[120][128][2], replace(half, stride=(1, 1, 1), ball=True)),
        HelperCase(90, 128, torch.bfloat16, helpers["seen_by_means uniform"]),
        HelperCase(120, 128, torch.bfloat16, helpers["leading of 2048"]),
        HelperCase(89, 128, torch.bfloat16, helpers["slot_scores partial slots 4"]),
        HelperCase(90, 128, torch.bfloat16, helpers["statistics uniform one tile values moments copy"]),
    ]
    results = list(compile_cases(cases, timeout=3600))
    assert [case for case, _ in results] == cases
    assert [found.fault(case) for case, found in results] == [None] * len(cases)
    assert "wgmma" in results[2][1].instructions
    assert "TMA" in results[2][1].instructions


def test_the_table_lists_every_shipped_kernel_and_no_spill():
    """A kernel, tile or set of features that was added since it was made is missing in it."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    page = (Path(__file__).parents[2] / "docs" / "results" / "triton_kernels.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| sm_")]
    cases = shipped()
    assert [tuple(row[:3]) for row in rows] == [(f"sm_{case.arch}", case.tile_name, case.name) for case in cases]
    assert len({(case.arch, case.tile_name, case.name) for case in cases}) == len(cases)
    assert {row[4] for row in rows} == {"0"}
    assert f"{len(cases)} compilations, 0 faults" in page


def test_without_a_gpu_the_reason_is_named(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    request = Request(torch.device("cpu"), torch.float32, 64)
    assert "needs a CUDA device" in backends(request)["triton"]
    assert "as dense attention" in backends(replace(request, remainder=Remainder(first_order="block")))["triton"]
    q, k, v = (x.float() for x in tensors(queries=40))
    with pytest.raises(UnsupportedError, match="backend 'triton' cannot run this call: it needs a CUDA device"):
        block_attention(q, k, v, random_plan(*uniform(40, 16)), backend="triton")
    monkeypatch.setattr(triton_backend.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in backends(request)["triton"]
