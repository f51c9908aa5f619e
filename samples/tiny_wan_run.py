"""A training run that survives a kill: optimisers, averaged weights, checkpoint, clock and log."""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit_accel.samples.team import Team, run_team
from dit_accel.samples.tiny_wan_recipes import Pace

T = TypeVar("T")
_LOG_EVERY = 50


class OutOfTime(Exception):
    """The time of this call is over before the training is; its state is saved."""


@dataclass(frozen=True)
class Place:
    """Where and for how long a training runs.

    Args:
        work: folder of checkpoints and logs.
        device: of the training. Default: cpu.
        is_half: whether passes run in bfloat16 where autocast allows it.
        deadline: `time.monotonic()` at which to save and stop. Default: never.
        team: the processes that train together, see `together`. Default: this one.
    """

    work: Path
    device: str = "cpu"
    is_half: bool = False
    deadline: float = math.inf
    team: Team = field(default_factory=Team)

    @property
    def is_gpu(self) -> bool:
        """Whether launches cost more than arithmetic."""
        return torch.device(self.device).type != "cpu"

    def precision(self) -> AbstractContextManager[Any]:
        """For the passes of a step."""
        kind = torch.device(self.device).type
        # A pass without gradients would leave weights in the cache that a later pass cannot send gradients through.
        return torch.autocast(kind, torch.bfloat16, enabled=self.is_half, cache_enabled=False)

    def check_time(self, what: str) -> None:
        """Stop if the time is over.

        Raises:
            OutOfTime: it is; names `what` was not finished.
        """
        if time.monotonic() >= self.deadline:
            raise OutOfTime(f"{what} is not finished; run the same command again to go on")

    def together(self, train: Callable[..., T], *arguments: Any) -> T:
        """What `train(place, *arguments)` returns in this process; it runs in all of the team at once."""
        return run_team(self.team.size, partial(_train_in, self, train, arguments))


def _train_in(place: Place, train: Callable[..., T], arguments: tuple[Any, ...], team: Team) -> T:
    return train(replace(place, team=team), *arguments)


class TrainingRun:
    """Weights in training; a checkpoint that exists is taken over.

    Args:
        place: where to run.
        name: of the checkpoint's file in the work folder, written under another name and renamed when complete.
        model: what is trained, and averaged.
        optimizers: with the largest learning rate of each.
        ema: share of the old average that a step keeps, once there are enough steps.
        others: modules that are kept in the checkpoint and not averaged.
        save_every: steps between checkpoints. Default 200.

    Attributes:
        kinds: draws that all processes of the team draw alike, such as how large a step is.
    """

    def __init__(
        self,
        place: Place,
        name: str,
        model: nn.Module,
        optimizers: list[tuple[torch.optim.Optimizer, float]],
        ema: float,
        others: Mapping[str, nn.Module] | None = None,
        save_every: int = 200,
    ) -> None:
        self.place, self.model, self.optimizers, self.ema = place, model, optimizers, ema
        self.checkpoint = place.work / f"{name}_checkpoint.pt"
        self.others, self.save_every = dict(others or {}), save_every
        place.team.start_alike([model, *self.others.values()])
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.first, self._begun, self._before, self._smooth = 0, time.monotonic(), 0.0, 1.0
        if self.checkpoint.exists():
            self._load(torch.load(self.checkpoint, weights_only=True, map_location=place.device))
        # A resumed run must not draw the batches of its first steps again.
        torch.manual_seed(self.first + place.team.apart)
        self.kinds = torch.Generator().manual_seed(self.first)

    def _load(self, state: dict[str, Any]) -> None:
        self.first, self.average, self._before = state["step"], state["average"], state.get("seconds", 0.0)
        self.model.load_state_dict(state["model"])
        for name, module in self.others.items():
            module.load_state_dict(state[name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    @property
    def seconds(self) -> float:
        """Of training so far, those before a kill counted in as far as they were saved."""
        return self._before + time.monotonic() - self._begun

    def steps(self, pace: Pace, export: Callable[[int, float], None] | None = None) -> Iterator[tuple[int, float]]:
        """Numbers of the steps still to do, each with the share of the training that is done before it.

        Between steps it calls `export`, with the steps and the share that are done, and saves the state: now and then,
        at the end, and when the time is over.

        Raises:
            OutOfTime: the time of this call is over.
        """
        step, team = self.first, self.place.team
        (done,) = team.agree(pace.done(step, self.seconds))
        while done < 1:
            yield step, done
            step += 1
            is_late: float = time.monotonic() >= self.place.deadline
            done, is_late = team.agree(pace.done(step, self.seconds), is_late)
            if team.leads and (done >= 1 or is_late or step % self.save_every == 0):
                if export is not None:
                    export(step, done)  # first: a run killed in between does some steps again, and misses no export
                self._save(step)
            if done < 1 and is_late:
                raise OutOfTime(f"step {step} of {self.checkpoint}; run the same command again to go on")

    def backward(self, loss: Tensor) -> None:
        """Add gradients of `loss`, the mean over the team's, to all weights in training."""
        loss.backward()
        modules = [self.model, *self.others.values()]
        self.place.team.average_gradients([w for m in modules for w in m.parameters() if w.requires_grad])

    def update(self, step: int, rate: float) -> None:
        """Step the optimisers at a share `rate` of their learning rates, and the average; clear the gradients."""
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.ema, (step + 1) / (step + 10))
        for name, value in self.model.state_dict().items():
            mean = self.average[name]
            mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)

    def log(self, stage: str, step: int, done: float, loss: Tensor, more: str = "") -> None:
        """Print the smoothed loss now and then."""
        self._smooth += 0.01 * (loss.item() - self._smooth)
        if step % _LOG_EVERY == 0 and self.place.team.leads:
            told = f"loss {self._smooth:.4f} {more} {self.seconds:.0f} s"
            print(f"{stage} step {step} ({done:.1%}) {told}", flush=True)

    def _save(self, step: int) -> None:
        saved = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        state = {"step": step, "model": self.model.state_dict(), "average": self.average, "optimizers": saved}
        state |= {"seconds": self.seconds}
        state |= {name: module.state_dict() for name, module in self.others.items()}
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").rename(self.checkpoint)


def linear_rate(step: int, done: float) -> float:
    """Warm-up, full speed for 40 %, and then a straight way down to 2 %."""
    return min(1.0, (step + 1) / 50) * min(1.0, 0.02 + 1.6 * (1 - done))


def cosine_rate(step: int, done: float) -> float:
    """Warm-up, and then half a cosine down to 0.5 %."""
    return min(1.0, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done)) + 0.005


def replace_parts(fresh: Path, output: Path) -> None:
    """Move the complete parts of a new pipeline folder over those of `output`; files beside them stay."""
    output.mkdir(parents=True, exist_ok=True)
    for part in fresh.iterdir():
        if (output / part.name).is_dir():
            shutil.rmtree(output / part.name)
        part.rename(output / part.name)
    fresh.rmdir()
