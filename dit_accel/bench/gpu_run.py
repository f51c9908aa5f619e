"""Check every kernel of this package on this machine, then time them: in processes of their own, written as it comes.

A task that crashes its process, hangs, or runs out of memory costs itself alone. Needs torch, Triton and NumPy; nothing
else of what the rest of the library is built on.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from dit_accel.bench.gpu_checks import CheckRow, Task, check_tasks, name_of, run_check
from dit_accel.bench.gpu_summary import Record
from dit_accel.bench.gpu_timings import SpeedRow, Stopwatch, speed_tasks
from dit_accel.bench.options import TIME_IS_UP, Options
from dit_accel.bench.table import stamp
from dit_accel.kernels.triton_configs import architecture

_SHARE_OF_CHECKS = 0.6  # of the time, at most
_LONGEST_TASK = 150.0  # seconds, its compilations included
_MOST_PROCESSES = 8  # checks wait for the compiler, which takes one core each
_INTERPRETED_AS = 90
Row = dict[str, Any]


class Worker:
    """A process that runs one task at a time; it is started anew when one took it down.

    Args:
        command: starts the process, which reads a task per line and answers rows of JSON.
        environment: variables beside those of this process.
    """

    def __init__(self, command: Sequence[str], environment: dict[str, str]) -> None:
        self._command, self._environment = list(command), os.environ | environment
        self._child: subprocess.Popen[str] | None = None
        self._errors: Any = None

    def run(self, task: Task, limit: float) -> Iterator[Row | str]:
        """Rows as they come, and last, where it did not get to the end, what happened in words."""
        child = self._started()
        assert child.stdin is not None
        assert child.stdout is not None
        late = threading.Event()

        def end() -> None:
            late.set()
            child.kill()

        watch = threading.Timer(limit, end)
        watch.start()
        try:
            child.stdin.write(json.dumps(task) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                row = json.loads(line)
                if row is None:
                    return
                yield row
        except BrokenPipeError:
            pass
        finally:
            watch.cancel()
        # Until it is gone it looks as if it could take another task.
        child.wait()
        yield f"it took more than {limit:.0f} s" if late.is_set() else f"it ended the process: {self._last_words()}"

    def _started(self) -> subprocess.Popen[str]:
        if self._child is None or self._child.poll() is not None:
            self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  read when the process has ended
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self._errors}
            self._child = subprocess.Popen(self._command, text=True, env=self._environment, **pipes)
        return self._child

    def _last_words(self) -> str:
        assert self._child is not None
        code = self._child.wait()
        self._errors.seek(0)
        return (self._errors.read().strip().splitlines() or [f"exit code {code}"])[-1][:300]

    def close(self) -> None:
        """End the process."""
        if self._child is not None:
            self._child.kill()
            self._child.wait()


def answer(rows: Callable[[Task], Iterable[Row]], tasks: TextIO, out: TextIO) -> None:
    """The other side of `Worker`: rows of each task as lines of JSON, then null; ends where the device is lost."""
    for line in tasks:
        for row in rows(json.loads(line)):
            print(json.dumps(row), file=out, flush=True)
        print("null", file=out, flush=True)
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
            torch.cuda.synchronize()  # raises for good after an illegal access


def check_rows(device: torch.device) -> Callable[[Task], Iterator[Row]]:
    """What a process that checks answers."""

    def rows(task: Task) -> Iterator[Row]:
        try:
            yield asdict(run_check(task, device))
        except Exception as failure:  # A compiler, a driver, out of memory: a check that does not end well has failed.
            yield asdict(replace(name_of(task), status="failed", note=_words(failure)))

    return rows


def speed_rows(options: Options) -> Callable[[Task], Iterator[Row]]:
    """What a process that times answers."""
    watch = Stopwatch(options)

    def rows(task: Task) -> Iterator[Row]:
        try:
            yield from map(asdict, watch.run(task))
        except Exception as failure:  # as above
            yield asdict(replace(unmeasured(task), note=f"failed: {_words(failure)}"))

    return rows


def unmeasured(task: Task) -> SpeedRow:
    """The row of a timing that did not happen."""
    words = [str(task[key]) for key in ("variant", "place", "q_block", "pattern") if key in task]
    return SpeedRow(task["kind"], task.get("shape", ""), " ".join(words), density=task.get("density"))


def _words(failure: Exception) -> str:
    return f"{type(failure).__name__}: {failure}".splitlines()[0][:300]


def run_stage(
    tasks: Sequence[Task],
    workers: Sequence[Worker],
    deadline: float,
    empty: Callable[[Task], CheckRow | SpeedRow],
    write: Callable[[Row], None],
) -> None:
    """Hand out tasks until they are done or `deadline` (of `time.monotonic`); what is left out is written, too."""
    waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
    lock = threading.Lock()
    for task in tasks:
        waiting.put(task)

    def note(task: Task, words: str) -> Row:
        row = asdict(empty(task)) | {"note": words}
        return row | {"status": "left out" if words == TIME_IS_UP else "failed"} if "status" in row else row

    def serve(worker: Worker) -> None:
        while True:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                worker.close()
                return
            left = deadline - time.monotonic()
            rows: Iterable[Row | str] = worker.run(task, min(left, _LONGEST_TASK)) if left > 0 else [TIME_IS_UP]
            for row in rows:
                # What was cut short by the end of the run has not failed.
                is_late = isinstance(row, str) and time.monotonic() >= deadline
                with lock:
                    write(note(task, TIME_IS_UP if is_late else row) if isinstance(row, str) else row)

    threads = [threading.Thread(target=serve, args=(worker,)) for worker in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main(command: Sequence[str], arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        command: starts this program again, for the processes that do the work.
        arguments: of the command line. Default: those of this process.

    Returns:
        0 when every check passed, 1 when one failed, 2 when the time was up before all of them ran.
    """
    given = _parser().parse_args(arguments)
    on_gpu = torch.cuda.is_available() if given.device == "auto" else given.device.startswith("cuda")
    device = torch.device(given.device if given.device != "auto" else "cuda" if on_gpu else "cpu")
    if given.work:
        # Whatever prints, prints elsewhere: this process answers on what was its standard output.
        out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        options = Options(device, torch.bfloat16 if on_gpu else torch.float32, rounds=given.rounds, limit=4.0)
        answer(check_rows(device) if given.work == "check" else speed_rows(options), sys.stdin, out)
        return 0
    arch = architecture(torch.cuda.get_device_capability(device)) if on_gpu else _INTERPRETED_AS
    if arch is None:
        print(f"the kernels need compute capability 8.0; {torch.cuda.get_device_name(device)} is older")
        return 1
    checks, timings = check_tasks(arch, not on_gpu), speed_tasks(arch, not on_gpu)
    checks = [task for task in checks if given.only in f"{name_of(task).kind} {name_of(task).name}"]
    timings = [task for task in timings if given.only in f"{task['kind']} {unmeasured(task).shape}"]
    begun = time.monotonic()
    record = Record(given.output, stamp() | {"command": " ".join(["python", *sys.argv])}, len(checks), len(timings))
    count = min(given.processes or min(_MOST_PROCESSES, os.cpu_count() or 1), max(1, len(checks)))
    child = [*command, "--device", str(device), "--rounds", str(given.rounds), "--work"]
    interpreted = {} if on_gpu else {"TRITON_INTERPRET": "1"}
    stages: list[tuple[str, list[Task], list[Worker], float, Any, Any]] = [
        ("check", checks, [Worker([*child, "check"], interpreted) for _ in range(count)], _SHARE_OF_CHECKS, name_of,
         record.check),
        ("time", timings, [Worker([*child, "time"], {})], 1.0, unmeasured, record.speed),
    ]  # fmt: skip
    for name, tasks, workers, share, empty, write in stages:
        print(f"{name}: {len(tasks)} tasks, {len(workers)} processes", flush=True)
        run_stage(tasks, workers, begun + 60 * share * given.minutes, empty, write)
    print(record.summary())
    print(f"written: {given.output}, {time.monotonic() - begun:.0f} s")
    return record.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="folder of the results")
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:1, or cpu: a rehearsal in the interpreter")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing later; checks get at most 60 %%")
    parser.add_argument("--processes", type=int, help="that check at the same time. Default: the cores, up to 8")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls of each kind")
    parser.add_argument("--only", default="", help="tasks whose kind and name contain this")
    parser.add_argument("--work", choices=("check", "time"), help=argparse.SUPPRESS)
    return parser
