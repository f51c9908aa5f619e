"""A Diffusers model hook that turns every forward pass of a transformer into a `RunState`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import BaseState, HookFunctionReference, StateManager
from torch import nn
from torch.utils.hooks import RemovableHandle

from dit_accel.families.base import Family, ForwardGeometry, bind_forward
from dit_accel.siblings import Siblings
from dit_accel.state import RunState

HOOK_NAME = "dit_accel_run_state"
Rearrange = Callable[[tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]]]
"""Changes the arguments of a forward pass, once it has been announced."""


class RunStateHook(ModelHook):
    """Reads geometry, step, noise level and guidance branch before each forward pass.

    Step, noise level and branch come from the pipeline's `cache_context` where it gives them. Without it, steps
    are counted from the timestep argument: a lower timestep is the next step, a repeated one is the next guidance
    branch of the same step, and a higher one begins a new generation. A timestep that one branch sees twice begins a
    new one too at the first step; later it is the next step (the second half of a step of Heun's, or a rounded
    timestep). Where one transformer takes over from another (Wan 2.2), its steps count on from those of the one
    before; `siblings` holds the hooks of all of them.
    """

    _is_stateful = True

    def __init__(self, family: Family, begin: Callable[[RunState], None], rearrange: Rearrange | None = None) -> None:
        super().__init__()
        self.family = family
        self.begin = begin
        self.rearrange = rearrange
        self.attached: RemovableHandle | None = None
        # Diffusers hands the cache context to every StateManager that it finds on a stateful hook.
        self.contexts = StateManager(BaseState)
        self.last: RunState | None = None
        self.siblings: Siblings[RunStateHook] = Siblings(self)
        self.generation = -1
        self._seen: set[str] = set()
        self._batches: dict[str, int] = {}
        self._timestep: float | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> RunStateHook:
        """A hook for the copy of the model, beside the hooks of those that are copied with it."""
        copied = memo[id(self)] = RunStateHook.__new__(RunStateHook)
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        copied.siblings.join(copied)
        return copied

    @torch.compiler.disable
    def announce(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Announce the forward pass; its arguments pass through, in another order where `rearrange` says so."""
        geometry = self.family.read(module, bind_forward(module, args, kwargs))
        context = getattr(self.contexts, "_context", None)
        if getattr(context, "step_index", None) is not None:
            state = self._from_context(context, geometry)
        else:
            state = self._from_timestep(getattr(context, "name", None), geometry)
        self.last = state
        self.begin(state)
        return (args, kwargs) if self.rearrange is None else self.rearrange(args, kwargs)

    def reset_state(self, module: nn.Module) -> nn.Module:
        """Called by Diffusers when a generation ends: the next pass begins a new one."""
        self.forget()
        self.contexts.reset()
        return module

    def forget(self) -> None:
        """The next pass begins a new generation."""
        self._seen.clear()
        self._batches.clear()
        self._timestep = None
        self.last = None

    def _from_context(self, context: Any, geometry: ForwardGeometry) -> RunState:
        step, branch, last = int(context.step_index), str(context.name), self.last
        if last is not None and step != last.step:
            self._seen.clear()
        is_new = last is None or step < last.step or branch in self._seen or self._shape_changed(branch, geometry)
        if is_new:
            self._seen.clear()
        self._seen.add(branch)
        sigma = context.sigma
        noise = self._read_noise(geometry) if sigma is None else float(sigma)
        return self._make(geometry, step, min(noise, 1.0), branch, context.num_inference_steps, is_new)

    def _from_timestep(self, name: str | None, geometry: ForwardGeometry) -> RunState:
        noise, last = self._read_noise(geometry), self.last
        branch = "default" if name is None else name
        same_step = self._timestep is not None and noise == self._timestep
        if name is None and same_step and "default" in self._seen:
            # A pipeline without contexts that calls the model twice per step runs two guidance branches.
            branch = "second"
        is_repeated = same_step and branch in self._seen
        is_new = (
            last is None
            or self._timestep is None
            or noise > self._timestep
            or (is_repeated and last.step == 0)
            or self._shape_changed(branch, geometry)
        )
        if is_new or is_repeated or not same_step:
            self._seen.clear()
        if (is_new or is_repeated) and branch == "second":
            branch = "default"
        self._seen.add(branch)
        self._timestep = noise
        is_next = is_repeated or not same_step
        step = self._first_step(noise) if is_new or last is None else last.step + int(is_next)
        return self._make(geometry, step, min(noise, 1.0), branch, None, is_new)

    def _first_step(self, noise: float) -> int:
        """The step after the last one of a sibling that ran at a higher noise level; 0 where there is none."""
        before = [
            h.last.step
            for h in self.siblings
            if h is not self and h.last and h._timestep is not None and h._timestep > noise
        ]
        return max(before, default=-1) + 1

    def _make(
        self, geometry: ForwardGeometry, step: int, noise: float, branch: str, steps: int | None, is_new: bool
    ) -> RunState:
        self.generation += int(is_new)
        if is_new:
            self._batches.clear()
        if is_new and step == 0:
            # Of a run that was interrupted they may still remember a step like those that come.
            for other in self.siblings:
                if other is not self:
                    other.forget()
        self._batches[branch] = geometry.batch
        return RunState(
            geometry.grid,
            step,
            noise,
            branch,
            steps,
            self.generation,
            geometry.batch,
            geometry.text_valid,
            geometry.prefix_frames,
        )

    def _shape_changed(self, branch: str, geometry: ForwardGeometry) -> bool:
        """Whether the grid is another, or the batch of this branch: one branch may hold both kinds of guidance."""
        known = self._batches.get(branch, geometry.batch)
        return self.last is not None and (self.last.grid != geometry.grid or known != geometry.batch)

    @staticmethod
    def _read_noise(geometry: ForwardGeometry) -> float:
        return float(geometry.timestep.max()) / geometry.timestep_scale


def track(
    model: nn.Module, family: Family, begin: Callable[[RunState], None], rearrange: Rearrange | None = None
) -> RunStateHook:
    """Attach a `RunStateHook` that calls `begin` before every forward pass of `model`, and then `rearrange`.

    PyTorch calls the hook; Diffusers' registry only knows it, to tell it contexts and resets. Were it one of the
    registry's wrappers around `model.forward`, then Accelerate's offload, which takes its own wrapper off and puts it
    on again after every pipeline call, would take this one with it.
    """
    hook = RunStateHook(family, begin, rearrange)
    registry: Any = HookRegistry.check_if_exists_or_initialize(model)
    registry.hooks[HOOK_NAME] = hook
    # At the bottom, where no other hook's wrapper is taken for the one around it.
    registry._hook_order.insert(0, HOOK_NAME)
    registry._fn_refs.insert(0, HookFunctionReference())
    hook.attached = model.register_forward_pre_hook(hook.announce, with_kwargs=True)
    return hook


def untrack(model: nn.Module) -> None:
    """Remove the hook that `track` attached."""
    registry: Any = HookRegistry.check_if_exists_or_initialize(model)
    index = registry._hook_order.index(HOOK_NAME)
    registry._hook_order.pop(index)
    registry._fn_refs.pop(index)
    attached = registry.hooks.pop(HOOK_NAME).attached
    attached.remove()
