"""Compile the shipped kernels ahead of time, with no GPU present, and say what they use of one.

`python -m dit_accel.kernels.aot` reads one JSON case per line and answers one line each: a compiler that aborts the
process then takes only itself along. See `compile_cases`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_accel.kernels.triton_configs import SHARED_MEMORY, TILES, Features, Tile, constants_of, cut, serves

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_NAMES = {name: dtype for dtype, name in _TYPES.items()}


@dataclass(frozen=True)
class Case:
    """One shipped compilation: a tile of the table with the features of a call, for one architecture."""

    arch: int
    tile: Tile
    features: Features
    k_size: int = 64

    @property
    def name(self) -> str:
        """What the features are, in words."""
        f = self.features
        words = [_TYPES[f.dtype], f"D{f.head_dim}"]
        words += ["ragged"] * (not f.uniform) + ["lengths"] * f.has_length + ["int8"] * f.int8
        words += ["window"] * bool(f.stride) + ["ball"] * f.ball + [["", "summary", "diagonal"][f.rest]] * bool(f.rest)
        words += [["", "global", "grouped"][f.first_order]] * bool(f.first_order)
        return " ".join(words)

    def to_json(self) -> str:
        """One line, for `from_json`."""
        fields = dataclasses.asdict(self)
        fields["features"]["dtype"] = _TYPES[self.features.dtype]
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> Case:
        """Undo `to_json`."""
        fields = json.loads(line)
        features = fields["features"] | {"dtype": _NAMES[fields["features"]["dtype"]]}
        features["stride"] = tuple(features["stride"])
        return cls(fields["arch"], Tile(**fields["tile"]), Features(**features), fields["k_size"])


@dataclass(frozen=True)
class Resources:
    """What one compilation uses.

    Args:
        registers: per thread, as assembled.
        spilled: bytes of spill stores and loads.
        shared: bytes of shared memory per program.
        warps: per program, with those that specialisation adds.
        instructions: which of wgmma, tcgen05, mma.sync, cp.async and TMA loads occur.
        failure: the compiler's message; None when it compiled.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    warps: int = 0
    instructions: tuple[str, ...] = ()
    failure: str | None = None

    def fault(self, case: Case) -> str | None:
        """Why this compilation must not ship, in one clause; None when it may."""
        if self.failure is not None:
            return f"it does not compile: {self.failure}"
        if self.spilled:
            return f"it spills {self.spilled} bytes of registers"
        if self.shared > SHARED_MEMORY[case.arch]:
            return f"it needs {self.shared} bytes of shared memory, the device has {SHARED_MEMORY[case.arch]}"
        half = case.features.dtype != torch.float32
        if half and case.arch == 90 and "wgmma" not in self.instructions:
            return "it does not use wgmma"
        if half and case.tile.stages > 1 and not {"TMA", "cp.async"} & set(self.instructions):
            return "its loads are not asynchronous"
        if case.tile.specialize and self.warps <= case.tile.warps:
            return "its warps are not specialised"
        return None


def features_shipped(head_dim: int) -> list[Features]:
    """The sets of features that every architecture is checked with, for one head size."""
    sets: list[dict[str, Any]] = [
        {},
        {"uniform": False, "has_length": True},
        {"int8": True},
        {"rest": 1},
        {"rest": 1, "first_order": 1},
        {"stride": (1, 1, 1)},
        {"stride": (1, 1, 1), "ball": True},
        {"rest": 2, "first_order": 2},
    ]
    half = [Features(head_dim, torch.bfloat16, **extra) for extra in sets]
    return [*half, *(Features(head_dim, torch.float32, **extra) for extra in (sets[0], sets[-1]))]


def shipped(architectures: Iterable[int] = tuple(TILES), head_dims: Iterable[int] = (64, 128)) -> list[Case]:
    """Every tile of the table with every set of features it may serve."""
    return [
        Case(arch, cut(tile, features, tile.block_m, 64), features)
        for arch in architectures
        for dim in head_dims
        for tile in TILES[arch][dim]
        for features in features_shipped(dim)
        if serves(tile, features, 64)
    ]


def compile_cases(cases: Iterable[Case], timeout: float = 600) -> Iterator[tuple[Case, Resources]]:
    """Compile each case in a child process; one that takes the process down is reported as a failure.

    Args:
        cases: what to compile.
        timeout: seconds for all of them together.
    """
    waiting = list(cases)
    while waiting:
        child = subprocess.run(
            [sys.executable, "-m", __name__],
            input="\n".join(case.to_json() for case in waiting),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        for line in child.stdout.splitlines():
            fields = json.loads(line)
            yield waiting.pop(0), Resources(**fields | {"instructions": tuple(fields["instructions"])})
        if waiting and child.returncode != 0:
            words = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            yield waiting.pop(0), Resources(failure=f"the compiler ended the process: {words}")


def compile_case(case: Case) -> Resources:
    """Compile one case here and assemble it, for the figures that only the assembler knows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dit_accel.kernels.triton_attention import attention

    constants = constants_of(case.features, case.tile, case.k_size)
    signature, attrs = _signature(attention, case.features, constants)
    constants |= {name: None for name, kind in signature.items() if kind == "constexpr" and name not in constants}
    source = ASTSource(attention, signature, constants, attrs)
    options = {"num_warps": case.tile.warps, "num_stages": case.tile.stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    except Exception as error:
        return Resources(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    registers, spilled = _assemble(made.asm["ptx"], case.arch)
    return Resources(
        registers, spilled, made.metadata.shared, _all_warps(made), _instructions(made.asm["ptx"], case.arch)
    )


def _signature(kernel: Any, features: Features, constants: dict[str, Any]) -> tuple[dict[str, str], dict[Any, Any]]:
    """The type of every argument, and which are multiples of 16."""
    from dit_accel.kernels.triton_attention import VARYING

    scalar, qk = _TYPES[features.dtype], "i8" if features.int8 else _TYPES[features.dtype]
    pointers = dict.fromkeys(("v", "out", "mean_k", "mean_v", "variance", "moments"), scalar)
    pointers |= dict.fromkeys(("q", "k"), qk) | dict.fromkeys(("lse", "q_step", "k_step", "log_tokens", "ball"), "fp32")
    pointers |= {"chosen": "u8"}
    unread = set() if features.has_length else {"kv_len"}
    unread |= set() if features.stride else {"full_counts", "lower", "upper", "coordinates"}
    unread |= set() if features.ball else {"ball"}
    unread |= set() if features.int8 else {"q_step", "k_step"}
    unread |= set() if features.rest else {"chosen", "log_tokens", "mean_k", "mean_v"}
    unread |= set() if features.rest == 2 else {"variance"}
    unread |= set() if features.first_order else {"moments"}
    signature, attrs = {}, {}
    for place, parameter in enumerate(kernel.params):
        name = parameter.name
        is_pointer = not name.endswith(("_b", "_h", "_n")) and place < kernel.arg_names.index("scale")
        if parameter.is_constexpr or name in unread:
            signature[name] = "constexpr"
        elif is_pointer:
            signature[name] = "*" + pointers.get(name, "i32")
        else:
            signature[name] = parameter.annotation_type or ("fp32" if name == "scale" else "i32")
        if signature[name] != "constexpr" and name not in VARYING and name != "scale":
            attrs[place,] = [["tt.divisibility", 16]]
    return signature, attrs


def _assemble(ptx: str, arch: int) -> tuple[int, int]:
    """Registers per thread and bytes spilled, from the assembler that comes with Triton."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    tool = folder / ("ptxas-blackwell" if arch >= 100 and (folder / "ptxas-blackwell").exists() else "ptxas")
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "kernel.ptx").write_text(ptx)
        command = [str(tool), "-v", f"--gpu-name={target}", "-o", f"{place}/kernel.cubin", f"{place}/kernel.ptx"]
        words = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", words)
    registers = re.findall(r"Used (\d+) registers", words)
    return max(map(int, registers)), sum(map(int, spills))


def _all_warps(made: Any) -> int:
    needed = re.search(r"\.reqntid (\d+)", made.asm["ptx"])
    return int(needed.group(1)) // 32 if needed else int(made.metadata.num_warps)


def _instructions(ptx: str, arch: int) -> tuple[str, ...]:
    marks = {
        "wgmma": "wgmma.mma_async",
        "tcgen05": "tcgen05.mma",
        "mma.sync": "mma.sync",
        "TMA": "cp.async.bulk.tensor",
        "cp.async": "cp.async.cg",
    }
    return tuple(name for name, mark in marks.items() if mark in ptx)


def main() -> None:
    """Read cases from standard input, answer each on standard output."""
    for line in sys.stdin:
        print(json.dumps(dataclasses.asdict(compile_case(Case.from_json(line)))), flush=True)


if __name__ == "__main__":
    main()
