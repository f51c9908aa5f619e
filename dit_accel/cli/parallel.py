"""One generation on the processes that torchrun started, by Diffusers' context parallelism.

Ulysses (arXiv 2309.14509) exchanges tokens for heads around each attention call, so that every method sees the whole
sequence. Under ring attention (arXiv 2310.01889) each process holds its queries alone, so that is for dense attention
and for methods whose plan depends on the layout alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dit_accel.errors import ConfigError

if TYPE_CHECKING:
    from dit_accel.layer_methods import LayerMethods
    from dit_accel.presets import Preset
    from dit_accel.schedule import Schedule

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_DECIDES_ALONE = "first_block"  # the step cache whose decision is taken from one process' tokens
_LAUNCH = "torchrun --nproc-per-node {} -m dit_accel.cli ..."


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started.

    Args:
        rank: number of this process among all. Default 0.
        local_rank: number among those of this machine, which is the number of its GPU. Default 0.
        count: of all processes. Default 1.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """The one process that prints and writes."""
        return self.rank == 0


def processes_here(environ: Mapping[str, str] = os.environ) -> Processes:
    """What torchrun says in the environment; a single process where it says nothing."""
    if not all(name in environ for name in _TORCHRUN):
        return Processes()
    return Processes(int(environ["RANK"]), int(environ["LOCAL_RANK"]), int(environ["WORLD_SIZE"]))


def check_single(used: Mapping[str, bool], processes: Processes) -> None:
    """Refuse options of which each process would do the whole work.

    Args:
        used: by option: whether it was given.
        processes: at hand.

    Raises:
        ConfigError: one was given under torchrun.
    """
    for option, is_used in used.items():
        if is_used and processes.count > 1:
            raise ConfigError(option, "runs in one process; start it without torchrun (several GPUs: --prompts --ray)")


@dataclass(frozen=True)
class Degrees:
    """Between how many processes one attention call is divided.

    Args:
        ulysses: by heads. Default 1.
        ring: by tokens. Default 1.
    """

    ulysses: int = 1
    ring: int = 1

    @property
    def is_alone(self) -> bool:
        """Nothing is divided."""
        return self.ulysses * self.ring == 1

    def check(self, processes: Processes) -> None:
        """Refuse degrees that are not those of the processes at hand.

        Raises:
            ConfigError: no torchrun, or another number of processes.
        """
        wanted, option = self.ulysses * self.ring, "--ring-degree" if self.ring > 1 else "--ulysses-degree"
        if processes.count == wanted:
            return
        if processes.count == 1:
            raise ConfigError(option, f"needs {wanted} processes; start them with: {_LAUNCH.format(wanted)}")
        if self.is_alone:
            raise ConfigError(
                option, f"torchrun started {processes.count} processes, which share one video with {option}"
                f" {processes.count}; without it each of them would make the same"
            )  # fmt: skip
        raise ConfigError(
            option, f"expected {processes.count}, the number of processes that torchrun started (all degrees"
            f" multiplied), got {wanted}"
        )  # fmt: skip

    def check_preset(self, preset: Preset, heads: int | None) -> None:
        """Refuse, before a model is loaded, what cannot be divided.

        Args:
            preset: what runs.
            heads: attention heads of the model; None where that is not known yet.

        Raises:
            ConfigError: heads that the degree does not divide, a method that needs all queries under ring attention or
                all heads under Ulysses, a step cache whose processes would decide differently.
        """
        if heads is not None and heads % self.ulysses:
            raise ConfigError(
                "--ulysses-degree", f"expected a divisor of the model's {heads} attention heads, got {self.ulysses}"
            )
        if heads is not None and self.ulysses > 1:
            self._check_heads(preset, heads)
        if self.ring > 1:
            self._check_ring(preset)
        if not self.is_alone and preset.extras.cache is not None and preset.extras.cache.name == _DECIDES_ALONE:
            raise ConfigError(
                "extras.cache", f"{_DECIDES_ALONE} decides from the tokens of one process, and processes that decide "
                "differently wait for each other for ever; use mag or taylorseer"
            )  # fmt: skip

    def _check_heads(self, preset: Preset, heads: int) -> None:
        for _, methods in _experts(preset):
            methods.check_model([heads] * preset.model.layers)
            methods.check_shares(heads, self.ulysses)

    def _check_ring(self, preset: Preset) -> None:
        from dit_accel.families.parallel import refusal_of_ring

        experts = [(schedule.max_error, methods.all()) for schedule, methods in _experts(preset)]
        refused = next(filter(None, (refusal_of_ring(methods, budget) for budget, methods in experts)), None)
        moved = sorted({method.name for _, methods in experts for method in methods} - {"dense"})
        if refused is None and self.ulysses > 1 and moved:
            refused = f"method {moved[0]!r}: ring and Ulysses together are for dense attention alone"
        if refused is not None:
            raise ConfigError("--ring-degree", f"{refused}; use --ulysses-degree alone, or --method dense")

    def enable(self, pipe: Any, device: str) -> None:
        """Divide the attention of every transformer of a pipeline; the process group must have been joined.

        Args:
            pipe: a Diffusers pipeline.
            device: where it lies.

        Raises:
            ConfigError: a model that Diffusers cannot divide, or whose heads the degree does not divide.
        """
        from diffusers import ContextParallelConfig
        from torch.distributed.device_mesh import init_device_mesh

        from dit_accel.siblings import transformers_of

        mesh = init_device_mesh(device.split(":")[0], (self.ring, self.ulysses), mesh_dim_names=("ring", "ulysses"))
        found: dict[str, Any] = dict(transformers_of(pipe))
        for name, model in found.items():
            if getattr(model, "_cp_plan", None) is None:
                raise ConfigError(
                    "--ulysses-degree", f"Diffusers has no plan to divide {type(model).__name__}; use one process"
                )
            if model.config.num_attention_heads % self.ulysses:
                raise ConfigError(
                    "--ulysses-degree",
                    f"expected a divisor of the {model.config.num_attention_heads} attention heads of {name}, "
                    f"got {self.ulysses}",
                )
            # "Anything": lengths that the degree does not divide. Diffusers has it for one of the two degrees alone.
            anything = {"ulysses_anything": self.ring == 1, "ring_anything": self.ulysses == 1}
            config = ContextParallelConfig(ring_degree=self.ring, ulysses_degree=self.ulysses, mesh=mesh, **anything)
            model.enable_parallelism(config=config)


def _experts(preset: Preset) -> list[tuple[Schedule, LayerMethods]]:
    """For each transformer of the preset's model: when methods run, and the method of every layer."""
    from dit_accel.layer_methods import LayerMethods
    from dit_accel.resolve import resolve_policy

    method, first = resolve_policy(preset, None, None, {})
    schedules = [first] if preset.schedule_2 is None else [first, preset.schedule_2]
    return [(schedule, LayerMethods(method, schedule, preset.model.layers)) for schedule in schedules]


ALONE = Degrees()
"""One process, which is the default."""


@contextmanager
def joined(processes: Processes, device: str) -> Iterator[str]:
    """Join the processes for the length of a block; gives the device of this one.

    Args:
        processes: from `processes_here`.
        device: the option `--device`; "auto" and "cuda" become the GPU with the number of the local rank.

    Raises:
        ConfigError: more processes on a machine than it has GPUs.
    """
    import torch
    import torch.distributed as dist

    if processes.count == 1:
        yield device
        return
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and torch.cuda.is_available():
        if processes.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                "--nproc-per-node", f"expected at most {torch.cuda.device_count()}, the number of CUDA devices"
            )
        device = f"cuda:{processes.local_rank}"
        torch.cuda.set_device(device)
    # Sizes travel between CPUs even where tensors travel between GPUs.
    on_gpu = device.startswith("cuda")
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "cpu:gloo")
    try:
        with _gloo_for_diffusers(on_gpu):
            yield device
    finally:
        dist.destroy_process_group()


@contextmanager
def _gloo_for_diffusers(on_gpu: bool) -> Iterator[None]:
    """On a CPU, replace two things of Diffusers that work with accelerators alone.

    It divides the rank by the number of accelerators, and gathers parts of unequal length in a way that only NCCL can.
    """
    import torch
    from diffusers.hooks import context_parallel

    if on_gpu:
        yield
        return
    stock = torch.accelerator.device_count, context_parallel._all_gather_anything
    torch.accelerator.device_count = lambda: max(1, stock[0]())
    context_parallel._all_gather_anything = _gather_unequal
    try:
        yield
    finally:
        torch.accelerator.device_count, context_parallel._all_gather_anything = stock


def _gather_unequal(tensor: Any, dim: int, group: Any) -> Any:
    """Parts of all processes in a row, which may differ in length along `dim`."""
    import torch
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor, group=group)
    return torch.cat(parts, dim=dim)
