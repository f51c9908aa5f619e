"""Spread the lines of a batch over the workers of a Ray cluster; a worker that dies is started again."""

from __future__ import annotations

import os
import tempfile
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_accel.batch import Item, Job, Manifest, reason_of
from dit_accel.cli.batching import Batch
from dit_accel.errors import ConfigError, UnsupportedError

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
    jobs: list[Job],
    manifest: Manifest,
    batch: Batch,
    tell: Callable[[str], None],
    address: str,
    workers: int,
) -> int:
    """Run every job that is not done on a Ray cluster; see `dit_accel.batch.run_batch` for the rest.

    Every worker takes one GPU, see `gpus_per_worker`, and loads the model once. Images that lines name
    are read by the workers. A line whose worker dies is tried again on the worker's successor.

    Args:
        jobs, manifest, tell: as in `run_batch`.
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
        return _run(ray, [remote.remote(batch) for _ in range(workers)], jobs, manifest, tell)
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


def _run(ray: Any, workers: list[Any], jobs: list[Job], manifest: Manifest, tell: Callable[[str], None]) -> int:
    """Keep every worker busy until nothing is left."""
    waiting = deque(job for job in jobs if not manifest.is_done(job))
    done, idle = len(jobs) - len(waiting), deque(workers)
    running: dict[Any, tuple[Job, Any, float]] = {}
    while waiting or running:
        while waiting and idle:
            job, worker = waiting.popleft(), idle.popleft()
            running[worker.make.remote(job.item, job.output)] = (job, worker, time.perf_counter())
        (finished, *_), _ = ray.wait(list(running), num_returns=1)
        job, worker, begun = running.pop(finished)
        idle.append(worker)
        try:
            _write(manifest.folder, ray.get(finished), job.output)
        except (ray.exceptions.RayError, OSError) as error:
            reason = reason_of(getattr(error, "cause", None) or error)
            manifest.record(job.item, job.key, job.output, "failed", error=reason)
            tell(f"line {job.item.number}: {reason}")
            continue
        seconds = round(time.perf_counter() - begun, 3)
        manifest.record(job.item, job.key, job.output, "done", seconds=seconds)
        tell(f"line {job.item.number}: {job.output}")
        done += 1
    return done


def _write(folder: Path, files: dict[str, bytes], result: str) -> None:
    """Write what a worker sent, the result last, each under a temporary name first."""
    for name in sorted(files, key=lambda name: name == result):
        partial = folder / f".partial-{name}"
        partial.write_bytes(files[name])
        os.replace(partial, folder / name)
