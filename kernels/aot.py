"""Compile the shipped kernels ahead of time, with no GPU present, and say what they use of one.

`python -m dit_accel.kernels.aot` reads one JSON case per line and answers one line each: a compiler that aborts the
process then takes only itself along. See `compile_cases`, and `aot_cases` for what is compiled.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_accel.kernels.aot_cases import Case, from_json
from dit_accel.kernels.triton_configs import SHARED_MEMORY


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
        return case.fault(self.instructions, self.warps)


def compile_cases(cases: Iterable[Case], timeout: float = 600) -> Iterator[tuple[Case, Resources]]:
    """Compile each case in a child process, and yield what it found as soon as it is there.

    A case that takes the process down, or is under way when the time is up, is reported as a failure.

    Args:
        cases: what to compile.
        timeout: seconds for one child process.
    """
    waiting = list(cases)
    while waiting:
        with tempfile.TemporaryFile("w+") as lines, tempfile.TemporaryFile("w+") as errors:
            lines.write("\n".join(case.to_json() for case in waiting))
            lines.seek(0)
            command = [sys.executable, "-m", __name__]
            with subprocess.Popen(command, stdin=lines, stdout=subprocess.PIPE, stderr=errors, text=True) as child:
                watch = threading.Timer(timeout, child.kill)
                watch.start()
                for line in child.stdout or ():
                    fields = json.loads(line)
                    yield waiting.pop(0), Resources(**fields | {"instructions": tuple(fields["instructions"])})
                watch.cancel()
            errors.seek(0)
            words = (errors.read().strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        if waiting:
            yield waiting.pop(0), Resources(failure=f"the compiler ended the process: {words}")


def compile_case(case: Case) -> Resources:
    """Compile one case here and assemble it, for the figures that only the assembler knows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    made = case.launch()
    target, kernel = GPUTarget("cuda", case.arch, 32), made.kernel
    backend = make_backend(target)
    # What `JITFunction.run` does before it compiles, for a device that is not there.
    options = made.options | {"debug": False, "instrumentation_mode": ""}
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*made.arguments, **options)
    parsed, signature, constants, attrs = kernel._pack_args(backend, options, bound, specialization, None)
    try:
        source = ASTSource(kernel, signature, constants, attrs)
        built = triton.compile(source, target=target, options=parsed.__dict__)
    except Exception as error:
        return Resources(failure=f"{type(error).__name__}: {error}".splitlines()[0])
    registers, spilled = _assemble(built.asm["ptx"], case.arch)
    return Resources(registers, spilled, built.metadata.shared, _all_warps(built), _instructions(built.asm["ptx"]))


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


def _instructions(ptx: str) -> tuple[str, ...]:
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
        print(json.dumps(dataclasses.asdict(compile_case(from_json(line)))), flush=True)


if __name__ == "__main__":
    main()
