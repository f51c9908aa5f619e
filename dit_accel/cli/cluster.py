"""Spread the lines of a batch over the workers of a Ray cluster; a worker that dies is started again."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.batch import BadLine, Item, Manifest
from dit_accel.cli.batching import Batch
from dit_accel.errors import ConfigError, DitAccelError, UnsupportedError

LOCAL = "local"
_RETRIES = 3  # of a line whose worker died


class _Worker:
    """Lives in a process of the cluster and keeps the pipeline loaded from line to line."""

    def __init__(self, batch: Batch) -> None:
        from dit_accel.cli.making import PipelineHolder

        self.batch, self.holder = batch, PipelineHolder()

    def make(self, item: Item, name: str) -> dict[str, bytes]:
        """The files of one line by name; they travel back as bytes, so that no folder has to be shared."""
        from dit_accel.cli.making import make

        with tempfile.TemporaryDirectory(prefix="dit-accel-") as folder:
            make(self.batch.run_of(item), Path(folder) / name, None, self.holder)
            return {file.name: file.read_bytes() for file in Path(folder).iterdir()}


def run_on_ray(
    items: list[Item | BadLine],
    manifest: Manifest,
    batch: Batch,
    tell: Callable[[str], None],
    address: str,
    workers: int,
) -> tuple[int, int]:
    """Run every item that is not done on a Ray cluster; see `dit_accel.batch.run_batch` for the rest.

    Every worker takes one GPU, see `gpus_per_worker`, and loads the model once. Images that lines name
    are read by the workers. A line whose worker dies is tried again on the worker's successor.

    Args:
        items, manifest, tell: as in `run_batch`.
        batch: what holds for all lines.
        address: of the cluster; "local" starts one on this machine and ends it.
        workers: how many.

    Raises:
        ConfigError: a device that a worker cannot have, or more workers than GPUs.
        UnsupportedError: ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise UnsupportedError("--ray needs Ray; install it with: pip install 'dit_accel[ray]'") from None
    batch = replace(batch, prompts=batch.prompts.resolve())
    try:
        ray.init(address=None if address == LOCAL else address, include_dashboard=False, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        raise UnsupportedError(f"--ray: no cluster at {address}: {' '.join(str(error).split())}") from None
    try:
        gpus = gpus_per_worker(batch.device, int(ray.cluster_resources().get("GPU", 0)), workers)
        remote = ray.remote(num_gpus=gpus, max_restarts=-1, max_task_retries=_RETRIES)(_Worker)
        return _run(ray, [remote.remote(batch) for _ in range(workers)], items, manifest, batch, tell)
    finally:
        ray.shutdown()


def gpus_per_worker(device: str, available: int, workers: int) -> int:
    """GPUs that each worker asks Ray for: one for CUDA, and for "auto" where the cluster has any.

    Ray hides the GPUs that a worker did not ask for, so that "auto" would find none.

    Args:
        device: the option `--device`.
        available: GPUs of the cluster.
        workers: how many.

    Raises:
        ConfigError: a GPU by its number, or fewer GPUs than workers, some of which would wait for ever.
    """
    if ":" in device:
        raise ConfigError("--device", f"each worker sees the GPU that Ray gives it as the first: cuda, not {device}")
    if device != "cuda" and not (device == "auto" and available):
        return 0
    if workers > available:
        raise ConfigError("--ray-workers", f"expected at most {available}, the GPUs of the cluster, got {workers}")
    return 1


def _run(
    ray: Any,
    workers: list[Any],
    items: list[Item | BadLine],
    manifest: Manifest,
    batch: Batch,
    tell: Callable[[str], None],
) -> tuple[int, int]:
    """Keep every worker busy until nothing is left."""
    done, waiting = 0, deque[tuple[Item, str]]()
    for item, name in _runnable(items, manifest, batch, tell):
        if manifest.is_done(item):
            done += 1
        else:
            waiting.append((item, name))
    idle = deque(workers)
    running: dict[Any, tuple[Item, str, Any, float]] = {}
    while waiting or running:
        while waiting and idle:
            (item, name), worker = waiting.popleft(), idle.popleft()
            running[worker.make.remote(item, name)] = (item, name, worker, time.perf_counter())
        (finished, *_), _ = ray.wait(list(running), num_returns=1)
        item, name, worker, begun = running.pop(finished)
        idle.append(worker)
        try:
            _write(manifest.folder, ray.get(finished), name)
        except (ray.exceptions.RayError, OSError) as error:
            cause = getattr(error, "cause", None) or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            manifest.record(item, name, "failed", error=reason)
            tell(f"line {item.number}: {reason}")
            continue
        manifest.record(item, name, "done", seconds=round(time.perf_counter() - begun, 3))
        tell(f"line {item.number}: {name}")
        done += 1
    return done, len(items)


def _runnable(
    items: list[Item | BadLine], manifest: Manifest, batch: Batch, tell: Callable[[str], None]
) -> Iterator[tuple[Item, str]]:
    """Items whose values their preset takes, with the name of their file; the others are reported here."""
    for item in items:
        if isinstance(item, BadLine):
            tell(f"line {item.number}: {item.reason}")
            continue
        try:
            batch.run_of(item)
            yield item, item.file_name(batch.extension(item))
        except DitAccelError as error:
            manifest.record(item, "", "failed", error=str(error))
            tell(f"line {item.number}: {error}")


def _write(folder: Path, files: dict[str, bytes], result: str) -> None:
    """Write what a worker sent, the result last, each under a temporary name first."""
    for name in sorted(files, key=lambda name: name == result):
        partial = folder / f".partial-{name}"
        partial.write_bytes(files[name])
        os.replace(partial, folder / name)
