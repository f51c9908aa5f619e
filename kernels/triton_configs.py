"""The checked-in tiles of the Triton kernels, and which serves a call: by structure, never by length or density.

At most four tiles per (architecture, head size) in half precision and one in float32; `dit_accel.kernels.aot` compiles
each ahead of time and accepts no spilled register.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class Tile:
    """One shape of the kernel.

    Args:
        block_m: queries per program.
        block_n: keys per step.
        warps: warps per program, before specialisation.
        stages: depth of the load pipeline.
        tma: keys and values come through tensor descriptors (sm_90 and later).
        specialize: one producer warp group loads while the others compute (sm_90 and later).
        fp32: for float32, which no other tile serves.
        level: the most demanding call it serves without spilling registers; see `Features.level`.
        least: the least demanding one; others are better served, or spill here.
        registers: per thread, what the assembler may use up to; None: it may spill a few to have more programs at once.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    tma: bool = False
    specialize: bool = False
    fp32: bool = False
    level: int = 2
    least: int = 0
    registers: int | None = None

    def __str__(self) -> str:
        extras = (" TMA" if self.tma else "") + (" WS" if self.specialize else "") + (" fp32" if self.fp32 else "")
        extras += f" r{self.registers}" if self.registers else ""
        return f"{self.block_m}x{self.block_n} w{self.warps} s{self.stages}{extras}"


@dataclass(frozen=True)
class Features:
    """What a call needs from the kernel; each set of features is one compilation.

    Args:
        head_dim: D.
        dtype: of q, k, v.
        uniform: all key blocks have one length but the last.
        has_length: valid keys are given per batch item.
        stride: step of the box predicate per axis; empty without partial blocks.
        int8: queries and keys are quantised.
        rest: 0: the rest is dropped; 1: summary tiles; 2: summary tiles with second-order mass; 3: about mean queries.
        first_order: 0: none; 1: one product at the end, for the whole head; 2: one per group of blocks.
        aligned: rows of k and v begin at multiples of 16 bytes.
        ball: partial blocks are cut by a ball inside the box.
        skip: tiles far below the running maximum are left out.
        fp8: weights and values are multiplied in e4m3.
    """

    head_dim: int
    dtype: torch.dtype
    uniform: bool = True
    has_length: bool = False
    stride: tuple[int, ...] = ()
    int8: bool = False
    rest: int = 0
    first_order: int = 0
    aligned: bool = True
    ball: bool = False
    skip: bool = False
    fp8: bool = False

    @property
    def padded_dim(self) -> int:
        """Head size as the kernel sees it: a power of two, at least 16, and 32 with operands of 8 bits."""
        return pad_head_dim(self.head_dim, LEAST_OF_8_BITS if self.int8 or self.fp8 else 16)

    @property
    def level(self) -> int:
        """Demand for registers.

        0: exact blocks; 1: summaries too; 2: windows, second order, first order, skips, and FP8 values beside queries
        of 16 bits. A first-order term after a specialised loop does not compile for sm_90 either (Triton 3.6).
        """
        if self.stride or self.rest == 2 or self.first_order or self.skip or (self.fp8 and not self.int8):
            return 2
        return int(self.rest > 0)

    @property
    def takes_descriptors(self) -> bool:
        """Whether tiles of keys and values may be loaded through tensor descriptors."""
        simple = self.rest < 2 and self.first_order < 2 and not self.stride
        return self.uniform and self.aligned and simple


_FP32 = Tile(16, 32, 8, 1, fp32=True)
_WIDE_HEADS = (Tile(32, 32, 8, 1), Tile(16, 16, 8, 1, fp32=True))


def _mma_sync(demanding: Tile) -> dict[int, tuple[Tile, ...]]:
    """Tiles for devices whose matrix unit reads registers; `demanding` serves what needs most of them."""
    common = (Tile(128, 64, 8, 2, level=0), Tile(64, 64, 4, 2, level=1))
    return {
        64: (*common, Tile(64, 64, 8, 1, least=1), Tile(16, 32, 4, 1, fp32=True)),
        128: (*common, demanding, _FP32),
        256: _WIDE_HEADS,
    }


def _descriptors(specialized: Tile, registers: int | None = None) -> dict[int, tuple[Tile, ...]]:
    """Tiles for devices with tensor descriptors; `registers` are those of the smallest tile at head size 64."""
    small = Tile(64, 64, 4, 2)
    tiles = (specialized, Tile(128, 64, 8, 2), Tile(64, 64, 4, 2, tma=True))
    return {64: (*tiles, replace(small, registers=registers), _FP32), 128: (*tiles, small, _FP32), 256: _WIDE_HEADS}


TILES: dict[int, dict[int, tuple[Tile, ...]]] = {
    80: _mma_sync(Tile(64, 32, 8, 1, least=1)),
    89: _mma_sync(Tile(32, 32, 8, 1, least=1)),
    90: _descriptors(Tile(128, 64, 4, 2, tma=True, specialize=True, level=1)),
    100: _descriptors(Tile(128, 64, 8, 2, tma=True, specialize=True, level=1), registers=255),
    120: _mma_sync(Tile(64, 32, 8, 1, least=1)),
}
"""Tiles by architecture and padded head size (64 stands for every smaller one), in order of preference."""

SHARED_MEMORY = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""Largest shared memory of one program, in bytes."""

MAX_HEAD_DIM = 256
LEAST_OF_8_BITS = 32
"""Over how many numbers a product of 8-bit operands sums at least."""
FROM_FP8 = 89
"""The first architecture whose matrix unit multiplies e4m3."""
NO_SKIP = 100
"""The architecture for which a product in a condition does not compile (Triton 3.6)."""

DOT_OF = {torch.float16: "tf32", torch.bfloat16: "tf32", torch.float32: "tf32x3"}
"""`input_precision` of dot products: three TF32 products give float32; half precision does not look at it."""


def architecture(capability: tuple[int, int]) -> int | None:
    """The entry of `TILES` for a compute capability; None for one older than 8.0."""
    number = 10 * capability[0] + capability[1]
    known = [arch for arch in TILES if arch <= number]
    return max(known, default=None)


def choose_tile(arch: int, features: Features, q_size: int, k_size: int) -> Tile:
    """The first tile of the table that can serve the features, cut down to small blocks of the plan.

    Args:
        arch: a key of `TILES`.
        features: what the call needs.
        q_size, k_size: block sizes of the plan.
    """
    rows = [tile for tile in TILES[arch][max(64, features.padded_dim)] if serves(tile, features, k_size)]
    tile = next((tile for tile in rows if tile.block_m <= q_size), rows[-1])
    return cut(tile, features, q_size, k_size)


def cut(tile: Tile, features: Features, q_size: int, k_size: int) -> Tile:
    """A tile of the table, no larger than the blocks of the plan need, and narrow where summaries need registers."""
    widest = 32 if features.rest == 2 or features.first_order == 2 else tile.block_n
    block_m = min(tile.block_m, max(16, next_power_of_two(q_size)))
    block_n = min(tile.block_n, widest, max(16, next_power_of_two(k_size)))
    block_n = max(block_n, LEAST_OF_8_BITS) if features.fp8 else block_n
    return replace(tile, block_m=block_m, block_n=block_n)


def serves(tile: Tile, features: Features, k_size: int) -> bool:
    """Whether a tile of the table may serve these features."""
    if tile.fp32 != (features.dtype == torch.float32) or not tile.least <= features.level <= tile.level:
        return False
    return not tile.tma or (features.takes_descriptors and k_size % tile.block_n == 0)


def pad_head_dim(head_dim: int, least: int = 16) -> int:
    """Head size as the kernels see it: a power of two, at least `least`."""
    return max(least, next_power_of_two(head_dim))


def next_power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << (number - 1).bit_length()


def constants_of(features: Features, tile: Tile, k_size: int) -> dict[str, Any]:
    """The compile-time arguments of the attention kernel; of `k_size` it only matters whether it exceeds a tile."""
    return {
        "HEAD_DIM": features.head_dim,
        "PADDED_DIM": features.padded_dim,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "UNIFORM": features.uniform,
        "ONE_TILE": k_size <= tile.block_n,
        "NESTED": not features.uniform and k_size > tile.block_n,
        "HAS_LENGTH": features.has_length,
        "AXES": len(features.stride),
        "STRIDE": features.stride,
        "BALL": features.ball,
        "INT8": features.int8,
        "FP8": features.fp8,
        "REST": features.rest,
        "FIRST_ORDER": features.first_order,
        "SKIP": features.skip,
        "TMA": tile.tma,
        "SPECIALIZE": tile.specialize,
        "DOT": DOT_OF[features.dtype],
    }
