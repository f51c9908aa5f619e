"""What is compiled ahead of time: the launches that the host code makes, recorded on tensors without memory.

So types, alignment and constants are those that ship. A case is a line of JSON, to be sent to a child process.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dit_accel.kernels.block_scores import Slots, score_blocks
from dit_accel.kernels.block_statistics import (
    block_means_in_triton,
    block_spread_in_triton,
    covariance_squares_in_triton,
)
from dit_accel.kernels.moving import move
from dit_accel.kernels.ranking import CutRanking, DigitRanking
from dit_accel.kernels.spec import AttentionCall, FirstOrder, Precision, Remainder
from dit_accel.kernels.triton_configs import FROM_FP8, NO_SKIP, TILES, Features, Tile, cut, serves
from dit_accel.kernels.triton_fp8 import Fp8Values
from dit_accel.kernels.triton_int8 import Int8Operands
from dit_accel.kernels.triton_launch import Prepared, features_of, launch
from dit_accel.kernels.triton_mixed import add_mixed_first_order
from dit_accel.kernels.triton_rest import Rest, about_queries
from dit_accel.plan import Blocking, BlockPlan, BoxPredicate

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NAMES = {name: dtype for dtype, name in _TYPES.items()}
_FIRST_ORDER: tuple[FirstOrder, ...] = ("none", "global", "grouped")
# Only tiles that load through descriptors take copies of keys and values.
_DESCRIPTORS = {arch for arch, sizes in TILES.items() if any(tile.tma for tiles in sizes.values() for tile in tiles)}
_OF_FP8 = ("value_range", "quantize_values")
_TOKENS, _HEADS = 4096, 2
_ALL_OF_A_LAYER = 1 << 20
_COLUMNS = (1182, 3000)  # key blocks of a long video, in rows that 4 and 8 warps hold


@dataclass(frozen=True)
class Launch:
    """A kernel with the arguments it was launched with."""

    kernel: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The kernel, and what it was told at compile time, in words."""
        told = [key.lower().replace("_", " ") for key, value in self.options.items() if value is True]
        sizes = [f"of {self.options['COLUMNS']}"] if self.is_row else []
        numbers = {"GROUP_N": "slots {}", "NORMS": "norms {}"}
        sizes += [words.format(self.options[key]) for key, words in numbers.items() if self.options.get(key)]
        return " ".join([self.kernel.__name__, *told, *sizes])

    @property
    def dtype(self) -> torch.dtype:
        """Of its first tensor."""
        return next(x.dtype for x in self.arguments if isinstance(x, Tensor))

    @property
    def is_row(self) -> bool:
        """Whether a program holds a row of scores, whatever the head size."""
        return "COLUMNS" in self.options and "HEAD_DIM" not in self.options


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Kernels that are launched inside are written down and do not run."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launches.append(Launch(kernel, arguments, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


@dataclass(frozen=True)
class AttentionCase:
    """A tile of the table with the features of a call, for one architecture."""

    arch: int
    tile: Tile
    features: Features
    k_size: int = 64

    @property
    def name(self) -> str:
        """What the features are, in words."""
        f = self.features
        words = [_TYPES[f.dtype], f"D{f.head_dim}"]
        words += ["ragged"] * (not f.uniform) + ["lengths"] * f.has_length + ["int8"] * f.int8 + ["fp8"] * f.fp8
        words += ["window"] * bool(f.stride) + ["ball"] * f.ball
        words += [["", "summary", "diagonal", "about the query"][f.rest]] * bool(f.rest)
        words += [["", "global", "grouped"][f.first_order]] * bool(f.first_order) + ["skip"] * f.skip
        return " ".join(words)

    @property
    def tile_name(self) -> str:
        """The tile, in words."""
        return str(self.tile)

    @property
    def remainder(self) -> Remainder | None:
        """What asks for these features."""
        if not self.features.rest:
            return None
        return Remainder(
            mass="diagonal" if self.features.rest == 2 else "mean",
            first_order=_FIRST_ORDER[self.features.first_order],
            about="query" if self.features.rest == 3 else "key",
        )

    @property
    def precision(self) -> Precision:
        """What asks for these features."""
        f = self.features
        return Precision("int8" if f.int8 else "input", True, 9.0 if f.skip else None, "fp8" if f.fp8 else "input")

    def launch(self) -> Launch:
        """The launch of the attention kernel for a call with these features."""
        f, shape = self.features, (1, _HEADS, _TOKENS, self.features.head_dim)
        q, k, v = (torch.empty(shape, dtype=f.dtype, device="meta") for _ in range(3))
        kv_len = torch.empty(1, dtype=torch.int32, device="meta") if f.has_length else None
        remainder = self.remainder
        call = AttentionCall(self._plan(), 0.1, remainder, self.precision, kv_len)
        with recording() as launches:
            rest = int8 = fp8 = None
            if remainder is not None:
                rest = Rest.of(k, v, call.plan, remainder, kv_len, self.tile.block_n if self.tile.tma else 0)
                rest = about_queries(rest, q, k, v, call.plan, kv_len, 0.1) if f.rest == 3 else rest
            if f.int8:
                int8 = Int8Operands.of(q, k, call.plan, 0.1, smooth=True, kv_len=kv_len)
                q, k = int8.q, int8.k
            if f.fp8:
                fp8 = Fp8Values.of(v, call.plan, kv_len)
            assert features_of(q, k, v, call) == f
            launch(q, k, v, call, Prepared(f, self.tile, rest), int8=int8, fp8=fp8)
        return launches[-1]

    def _plan(self) -> BlockPlan:
        """A plan that asks for the features."""
        q_blocks = Blocking.uniform(_TOKENS, self.tile.block_m)
        size = self.k_size
        k_blocks = Blocking.uniform(_TOKENS, size)
        if not self.features.uniform:
            k_blocks = Blocking.from_lengths([size // 2, *[size] * (_TOKENS // size - 1), size // 2])
        plan = BlockPlan.full(q_blocks, k_blocks, "meta")
        if not self.features.stride:
            return plan
        at = torch.empty(_TOKENS, len(self.features.stride), dtype=torch.int32, device="meta")
        ball = torch.empty(len(self.features.stride) + 1, device="meta") if self.features.ball else None
        box = BoxPredicate(at, at, at, self.features.stride, ball)
        return dataclasses.replace(plan, full_counts=torch.empty_like(plan.counts), predicate=box)

    def fault(self, instructions: tuple[str, ...], warps: int) -> str | None:
        """What the compilation lacks, in one clause."""
        half = self.features.dtype != torch.float32
        if half and self.arch == 90 and "wgmma" not in instructions:
            return "it does not use wgmma"
        if half and self.tile.stages > 1 and not {"TMA", "cp.async"} & set(instructions):
            return "its loads are not asynchronous"
        if self.tile.specialize and warps <= self.tile.warps:
            return "its warps are not specialised"
        return None

    def to_json(self) -> str:
        """One line, for `from_json`."""
        fields = dataclasses.asdict(self)
        fields["features"]["dtype"] = _TYPES[self.features.dtype]
        return json.dumps(fields)


@dataclass(frozen=True)
class HelperCase:
    """One of the launches around attention: statistics, INT8 operands, mean queries, ranking, moving."""

    arch: int
    head_dim: int
    dtype: torch.dtype
    place: int

    @property
    def name(self) -> str:
        """Kernel, compile-time switches, and what it is for."""
        made = self.launch()
        return made.name if made.is_row else f"{made.name} {_TYPES[made.dtype]} D{self.head_dim}"

    @property
    def tile_name(self) -> str:
        """Its warps."""
        return f"w{self.launch().options.get('num_warps', 4)}"

    def launch(self) -> Launch:
        """The launch itself."""
        return helper_launches(self.head_dim, self.dtype)[self.place]

    def fault(self, instructions: tuple[str, ...], warps: int) -> str | None:
        """Nothing in particular is asked of it."""
        return None

    def to_json(self) -> str:
        """One line, for `from_json`."""
        return json.dumps(dataclasses.asdict(self) | {"dtype": _TYPES[self.dtype]})


Case = AttentionCase | HelperCase


def from_json(line: str) -> Case:
    """Undo `to_json` of a case."""
    fields = json.loads(line)
    if "place" in fields:
        return HelperCase(**fields | {"dtype": _NAMES[fields["dtype"]]})
    features = fields["features"] | {"dtype": _NAMES[fields["features"]["dtype"]]}
    features["stride"] = tuple(features["stride"])
    return AttentionCase(fields["arch"], Tile(**fields["tile"]), Features(**features), fields["k_size"])


@lru_cache(maxsize=8)
def helper_launches(head_dim: int, dtype: torch.dtype) -> tuple[Launch, ...]:
    """Every different launch around attention for one head size and dtype, in a fixed order."""
    q, k, v = (torch.empty(1, _HEADS, _TOKENS, head_dim, dtype=dtype, device="meta") for _ in range(3))
    blocks = Blocking.uniform(_TOKENS, 64)
    call = AttentionCall(BlockPlan.full(blocks, blocks, "meta"), 0.1)
    kv_len = torch.empty(1, dtype=torch.int32, device="meta")
    with recording() as launches:
        block_means_in_triton(q, blocks, None)
        block_means_in_triton(q, blocks, kv_len, 4)
        for step in (1, 4):
            block_spread_in_triton(q, blocks, kv_len, step)
            covariance_squares_in_triton(k, v, blocks, kv_len, step)
        _scores(q, k)
        Int8Operands.of(q, k, call.plan, 0.1, smooth=True, kv_len=None)
        Fp8Values.of(v, call.plan, None)
        Rest.of(k, v, call.plan, Remainder(first_order="global"), None, copy_to=64)
        Rest.of(k, v, call.plan, Remainder("diagonal", "grouped"), kv_len)
        for remainder in (Remainder("diagonal", "mixed"), Remainder(first_order="mixed", about="query")):
            rest = Rest.of(k, v, call.plan, remainder, None)
            if remainder.about == "query":
                rest = about_queries(rest, q, k, v, call.plan, None, 0.1)
            part, lse = q.float(), q[..., 0].float()
            add_mixed_first_order(q, part, lse, dataclasses.replace(call, remainder=remainder), rest)
        index = torch.empty(_TOKENS, dtype=torch.int64, device="meta")
        for scatter in (False, True):
            move(q, index, scatter)
        for columns in (*_COLUMNS, _ALL_OF_A_LAYER):
            _rankings(columns)
    different: dict[str, Launch] = {}
    for made in launches:
        constants = {key: value for key, value in made.options.items() if key.isupper()}
        different.setdefault(f"{made.kernel.__name__} {constants}", made)
    return tuple(different.values())


def _scores(q: Tensor, k: Tensor) -> None:
    """Scores of blocks of 64 tokens by mean, by parts, by antidiagonals, by all tokens and by samples."""
    for slots, partial in ((4, False), (4, True), (64, False)):
        sides = [_slots(x, slots) for x in (q, k)]
        score_blocks(*sides, stride=64 // slots, relative=True, has_partial=partial)
    every, some = ([_slots(x, slots) for x in (q, k)] for slots in (64, 16))
    score_blocks(*some, largest=True, relative=True)
    # The mass of all tokens, weighted anew, and the largest weights.
    for given, largest, sides in ((False, False, every), (True, False, every), (True, True, some)):
        norms = sides[0].weight.expand(1, _HEADS, -1, -1).contiguous()
        score_blocks(*sides, largest=largest, relative=True, norms=norms, given=given)
    for slots in (1, 4):
        score_blocks(*(_slots(x.float(), slots) for x in (q, k)))


def _slots(x: Tensor, slots: int) -> Slots:
    at = torch.empty(1, 1, x.shape[2] // 64, slots, dtype=torch.int32, device="meta")
    return Slots(x, at, at, at.float())


def _rankings(columns: int) -> None:
    scores = torch.empty(1, _HEADS, 8, columns, device="meta")
    first, counts = torch.empty_like(scores, dtype=torch.bool), scores[..., 0].long()
    if columns == _ALL_OF_A_LAYER:
        DigitRanking(scores, first).leading(counts)
        return
    ranking = CutRanking(scores, first)
    ranking.leading(counts)
    mass = torch.empty((), dtype=torch.float64, device="meta")
    ranking.reaching(scores, mass, "keep")
    ranking.reaching(scores, mass, "drop")


def features_shipped(head_dim: int) -> list[Features]:
    """The sets of features that every architecture is checked with, for one head size."""
    sets: list[dict[str, Any]] = [
        {},
        {"uniform": False, "has_length": True},
        {"int8": True},
        {"rest": 1},
        {"rest": 1, "first_order": 1},
        {"rest": 3},
        {"rest": 3, "first_order": 2},
        {"stride": (1, 1, 1)},
        {"stride": (1, 1, 1), "ball": True},
        {"skip": True},
        {"skip": True, "int8": True},
        {"fp8": True},
        {"fp8": True, "int8": True},
        {"fp8": True, "int8": True, "uniform": False, "has_length": True},
        {"fp8": True, "int8": True, "stride": (1, 1, 1)},
        {"fp8": True, "int8": True, "skip": True},
        {"rest": 2, "first_order": 2},
    ]
    half = [Features(head_dim, torch.bfloat16, **extra) for extra in sets]
    return [*half, *(Features(head_dim, torch.float32, **extra) for extra in (sets[0], sets[-1]))]


def shipped(architectures: Iterable[int] = tuple(TILES), head_dims: Iterable[int] = (64, 128)) -> list[Case]:
    """Every tile of the table with every set of features it may serve, and every helper."""
    cases: list[Case] = []
    dims = list(head_dims)
    for arch in architectures:
        for dim in dims:
            cases += [
                AttentionCase(arch, cut(tile, features, tile.block_m, 64), features)
                for tile in TILES[arch][dim]
                for features in features_shipped(dim)
                if serves(tile, features, 64) and _is_offered(features, arch)
            ]
            cases += [
                HelperCase(arch, dim, torch.bfloat16, place)
                for place, made in enumerate(helper_launches(dim, torch.bfloat16))
                # A ranking knows no head size: once is enough.
                if (dim == dims[0] or not made.is_row) and (arch in _DESCRIPTORS or not made.options.get("COPY"))
                if arch >= FROM_FP8 or made.kernel.__name__ not in _OF_FP8
            ]
    return cases


def _is_offered(features: Features, arch: int) -> bool:
    """Whether the backend takes such a call on this architecture at all."""
    return not (features.skip and arch == NO_SKIP) and not (features.fp8 and arch < FROM_FP8)
