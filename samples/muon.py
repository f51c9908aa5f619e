"""Muon: momentum orthogonalised by a Newton-Schulz iteration (Jordan et al. 2024), for matrices and convolutions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor, nn

_A, _B, _C = 3.4445, -4.7750, 2.0315  # coefficients of the quintic iteration


def orthogonalize(update: Tensor, steps: int = 5, is_half: bool = False) -> Tensor:
    """Nearly the closest semi-orthogonal matrix to each of `update` `[..., rows, columns]`.

    Args:
        update: what to make orthogonal.
        steps: of the iteration. Default 5.
        is_half: compute in bfloat16. Default False.
    """
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    x = x.bfloat16() if is_half else x
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.mT if is_tall else x).to(update.dtype)


class Muon(torch.optim.Optimizer):
    """Optimiser for weights of two or more axes; the others belong to AdamW (see `split_parameters`).

    Args:
        parameters: weights.
        lr: step size. Default 0.02.
        momentum: default 0.95.
        weight_decay: share of a weight that goes per unit of lr. Default 0.
        is_stacked: orthogonalise weights of one shape together: a GPU waits for launches otherwise. Default False.
        is_half: orthogonalise in bfloat16. Default False.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        is_stacked: bool = False,
        is_half: bool = False,
    ) -> None:
        self.is_stacked, self.is_half = is_stacked, is_half
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all weights that have a gradient.

        Args:
            closure: computes the loss and its gradients anew, before the update. Default None: they are there.

        Returns:
            The loss of the closure; None without one.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            self._update(group)
        return loss

    def _update(self, group: dict[str, Any]) -> None:
        """One step of the weights of a group."""
        weights = [weight for weight in group["params"] if weight.grad is not None]
        stacks: dict[object, list[nn.Parameter]] = defaultdict(list)
        for number, weight in enumerate(weights):
            stacks[weight.flatten(1).shape if self.is_stacked else number].append(weight)
        for stack in stacks.values():
            gathered = torch.stack([self._accumulate(weight, group["momentum"]) for weight in stack])
            updates = orthogonalize(gathered, is_half=self.is_half)
            for weight, update in zip(stack, updates, strict=True):
                rows, columns = update.shape
                scale = max(1.0, rows / columns) ** 0.5
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def _accumulate(self, weight: nn.Parameter, momentum: float) -> Tensor:
        """Take the gradient into the momentum of a weight; what both say together, as a matrix."""
        assert weight.grad is not None
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].mul_(momentum).add_(weight.grad)
        return weight.grad.add(state["momentum"], alpha=momentum).flatten(1)


def split_parameters(model: nn.Module, skip: tuple[str, ...] = ()) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Weights in training: for Muon (hidden matrices and convolutions), and the rest for AdamW.

    Args:
        model: the model.
        skip: parts of names that go to AdamW whatever their shape (embeddings, first and last layers).
    """
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            continue
        is_hidden = weight.ndim >= 2 and min(weight.shape[:2]) > 8 and not any(part in name for part in skip)
        (hidden if is_hidden else rest).append(weight)
    return hidden, rest
