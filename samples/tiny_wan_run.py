"""A training run that survives a kill: optimisers, averaged weights, checkpoint and log."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_SAVE_EVERY = 200
_LOG_EVERY = 50


class TrainingRun:
    """Weights in training; a checkpoint that exists is taken over.

    Args:
        checkpoint: file of the state, written under another name and renamed when complete.
        model: what is trained, and averaged.
        optimizers: with the largest learning rate of each.
        ema: share of the old average that a step keeps, once there are enough steps.
        others: modules that are kept in the checkpoint and not averaged.
        save_every: steps between checkpoints. Default 200.
    """

    def __init__(
        self,
        checkpoint: Path,
        model: nn.Module,
        optimizers: list[tuple[torch.optim.Optimizer, float]],
        ema: float,
        others: Mapping[str, nn.Module] | None = None,
        save_every: int = _SAVE_EVERY,
    ) -> None:
        self.checkpoint, self.model, self.optimizers, self.ema = checkpoint, model, optimizers, ema
        self.others, self.save_every = dict(others or {}), save_every
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.first, self._begun, self._smooth = 0, time.time(), 1.0
        if checkpoint.exists():
            self._load(torch.load(checkpoint, weights_only=True))
        torch.manual_seed(self.first)  # a resumed run must not draw the batches of its first steps again

    def _load(self, state: dict[str, Any]) -> None:
        self.first, self.average = state["step"], state["average"]
        self.model.load_state_dict(state["model"])
        for name, module in self.others.items():
            module.load_state_dict(state[name])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def update(self, step: int, steps: int) -> None:
        """Step the optimisers, warm-up and linear decay over `steps`, and the average; clear the gradients."""
        rate = min(1.0, (step + 1) / 50) * min(1.0, 0.02 + 1.6 * (1 - step / steps))
        for optimizer, lr in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * rate
            optimizer.step()
            optimizer.zero_grad()
        decay = min(self.ema, (step + 1) / (step + 10))
        for name, value in self.model.state_dict().items():
            mean = self.average[name]
            mean.lerp_(value, 1 - decay) if value.is_floating_point() else mean.copy_(value)

    def log(self, stage: str, step: int, steps: int, loss: Tensor, more: str = "") -> None:
        """Print the smoothed loss now and then."""
        self._smooth += 0.01 * (loss.item() - self._smooth)
        if step % _LOG_EVERY == 0:
            told = f"loss {self._smooth:.4f} {more} {time.time() - self._begun:.0f} s"
            print(f"{stage} step {step}/{steps} {told}", flush=True)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to save and export after this step."""
        return step % self.save_every == self.save_every - 1 or step == steps - 1

    def save(self, step: int) -> None:
        """Write the checkpoint."""
        saved = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        state = {"step": step + 1, "model": self.model.state_dict(), "average": self.average, "optimizers": saved}
        state |= {name: module.state_dict() for name, module in self.others.items()}
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").rename(self.checkpoint)


def replace_parts(fresh: Path, output: Path) -> None:
    """Move the complete parts of a new pipeline folder over those of `output`; files beside them stay."""
    output.mkdir(parents=True, exist_ok=True)
    for part in fresh.iterdir():
        if (output / part.name).is_dir():
            shutil.rmtree(output / part.name)
        part.rename(output / part.name)
    fresh.rmdir()
