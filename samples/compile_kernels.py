"""Compile every shipped Triton kernel for every architecture, with no GPU: `python samples/compile_kernels.py`.

Results are kept in a file of JSON lines, so that an interrupted run goes on where it stopped; the table is written from
that file. The command fails when a kernel spills, needs too much shared memory, or lacks the instructions it is for.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from functools import cache
from importlib import metadata
from pathlib import Path

from dit_accel.kernels.aot import Resources, compile_cases
from dit_accel.kernels.aot_cases import Case, shipped
from dit_accel.kernels.triton_configs import TILES
from dit_accel.report.records import environment

# What a launch tells the compiler beside the constants of the kernel.
_OPTIONS = ("num_warps", "num_stages", "maxnreg")


@cache
def key(case: Case) -> str:
    """What a result depends on: the case, what it is launched with, the code that its kernel reaches, the compiler."""
    made = case.launch()
    told = sorted((name, str(value)) for name, value in made.options.items() if name.isupper() or name in _OPTIONS)
    code = f"{told} {made.kernel.cache_key} {metadata.version('triton')}"
    return f"{hashlib.sha256(code.encode()).hexdigest()[:16]} {case.arch} {case.tile_name} {case.name}"


def known(path: Path) -> dict[str, Resources]:
    """What earlier runs found, by key."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {}
    for line in lines:
        name, fields = json.loads(line)
        found[name] = Resources(**fields | {"instructions": tuple(fields["instructions"])})
    return found


def row(case: Case, found: Resources) -> str:
    """One line of the table."""
    cells = [f"sm_{case.arch}", case.tile_name, case.name]
    if found.failure is None:
        cells += [str(found.registers), str(found.spilled), f"{found.shared / 1024:.0f}", str(found.warps)]
        cells += [", ".join(found.instructions)]
    else:
        cells += ["", "", "", "", found.failure]
    return f"| {' | '.join(cells)} |"


def table(cases: list[Case], found: dict[str, Resources], command: str) -> str:
    """The page: how it was made, the cases that failed, and every case."""
    faults = [f"- {case.arch} {case.tile_name} {case.name}: {why}" for case in cases if (why := fault_of(case, found))]
    versions = ", ".join(f"{name} {value}" for name, value in environment().items())
    lines = [
        "# What the Triton kernels use of a GPU",
        "",
        f"Made by `{command}`, with no GPU present: Triton compiles, its ptxas assembles. Nothing here was timed.",
        "",
        f"{versions}, {time.strftime('%Y-%m-%d')}",
        "",
        f"{len(cases)} compilations, {len(faults)} faults (spilled registers, too much shared memory, no wgmma on "
        "sm_90, no asynchronous loads, warps not specialised).",
        "",
        *(faults and [*faults, ""]),
        "| device | tile | call | registers | spilled bytes | shared KiB | warps | instructions |",
        "|---|---|---|---|---|---|---|---|",
        *(row(case, found[key(case)]) for case in cases),
    ]
    return "\n".join(lines) + "\n"


def fault_of(case: Case, found: dict[str, Resources]) -> str | None:
    """Why the case must not ship, or None."""
    return found[key(case)].fault(case)


def main() -> None:
    """Compile what is missing, write the table, and fail when a case has a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, nargs="+", default=sorted(TILES), choices=sorted(TILES))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--keep", type=Path, default=Path("outputs/compiled_kernels.jsonl"))
    parser.add_argument("--output", type=Path, help="write the table here; default: print it")
    arguments = parser.parse_args()
    arguments.keep.parent.mkdir(parents=True, exist_ok=True)
    cases = shipped(arguments.architectures, arguments.dims)
    found = known(arguments.keep)
    missing = [case for case in cases if key(case) not in found]
    for case, result in compile_cases(missing, timeout=6 * 3600):
        found[key(case)] = result
        with arguments.keep.open("a", encoding="utf-8") as file:
            file.write(json.dumps([key(case), dataclasses.asdict(result)]) + "\n")
        print(row(case, result), file=sys.stderr, flush=True)
    text = table(cases, found, "python samples/compile_kernels.py")
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text)
    sys.exit(any(fault_of(case, found) for case in cases))


if __name__ == "__main__":
    main()
