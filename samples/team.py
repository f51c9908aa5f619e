"""Processes that train one model together, each on its part of every batch.

Two processes of one thread do more on a CPU than one process of two threads: small models are made of operations too
short to be worth dividing.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.multiprocessing.spawn import start_processes
from torch.nn.utils import parameters_to_vector, vector_to_parameters

T = TypeVar("T")
_PATIENCE = timedelta(days=1)  # the first may be busy writing pictures while others wait


@dataclass(frozen=True)
class Team:
    """One process of some.

    Args:
        rank: its number. Default 0: the first, which logs and writes files for all.
        size: how many there are. Default 1: nobody else, and no method communicates.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process logs and writes files."""
        return self.rank == 0

    @property
    def apart(self) -> int:
        """What to add to a seed, so that no two processes draw the same."""
        return 1_000_003 * self.rank

    def drawing(self, workers: int) -> int:
        """Processes of `workers` that may draw scenes for this one: none in a team, whose members may start none."""
        return workers if self.size == 1 else 0

    def part(self, batch: int) -> int:
        """How many of a batch are this process's: as many as everyone's, and one at least."""
        return max(1, batch // self.size)

    def agree(self, *values: float) -> tuple[float, ...]:
        """What the first process says the values are."""
        if self.size == 1:
            return values
        told = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(told, 0)
        return tuple(told.tolist())

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()

    def collect(self, mine: dict[int, T]) -> dict[int, T]:
        """The entries of all processes together, by key."""
        found: list[dict[int, T]] = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(found, mine)
        return {key: value for part in found for key, value in sorted(part.items())}

    def start_alike(self, modules: Iterable[nn.Module]) -> None:
        """Give the modules the weights that they have in the first process."""
        if self.size > 1:
            for module in modules:
                for value in module.state_dict().values():
                    dist.broadcast(value, 0)

    def average_gradients(self, weights: Sequence[nn.Parameter]) -> None:
        """Replace gradients by their mean over all processes; one that is there for nobody stays away."""
        if self.size == 1:
            return
        found = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        total = parameters_to_vector(found)
        dist.all_reduce(total)
        vector_to_parameters(total / self.size, found)
        for weight, mean in zip(weights, found, strict=True):
            weight.grad = mean if weight.grad is not None or mean.any() else None


def run_team(size: int, call: Callable[[Team], T]) -> T:
    """What `call` returns in the first of `size` processes; it runs in all of them at once.

    Args:
        size: how many. With 1 it is called here, and that is all.
        call: gets the process's `Team`; made of what can be pickled where there are several processes. Weights go to
            the others by value.

    Raises:
        Exception: what `call` raises in this process, or what it raised in another that left this one alone.
    """
    if size == 1:
        return call(Team())
    with TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        # Bytes: torch would put tensors among its arguments into memory that all processes share.
        others = start_processes(
            _join, (size, meeting, pickle.dumps(call)), nprocs=size - 1, join=False, daemon=True, start_method="spawn"
        )
        try:
            come = FileStore(meeting, size)
            while not come.check([_name(rank) for rank in range(1, size)]):
                others.join(timeout=0.2)  # raises what kept another process from coming
            with _member(Team(0, size), come) as team:
                try:
                    return call(team)
                except RuntimeError:
                    others.join(timeout=2)  # raises what broke another process, if it was that
                    raise
        finally:
            for process in others.processes:
                process.join(timeout=10)
                process.terminate()


def _join(index: int, size: int, meeting: str, call: bytes) -> None:
    team, come = Team(index + 1, size), FileStore(meeting, size)
    work = pickle.loads(call)
    come.set(_name(team.rank), "")
    with _member(team, come):
        work(team)


def _name(rank: int) -> str:
    return f"process {rank} has come"


@contextmanager
def _member(team: Team, come: FileStore) -> Iterator[Team]:
    """Part of the processes that have come, with its share of the cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // team.size))
    dist.init_process_group("gloo", store=come, rank=team.rank, world_size=team.size, timeout=_PATIENCE)
    try:
        yield team
    finally:
        dist.destroy_process_group()
        torch.set_num_threads(threads)
