"""What calibration keeps: a few sums per range of steps, layer, head and candidate, which a killed run resumes from."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_accel.errors import ConfigError

FORMAT = "dit_accel.calibration/4"

_TENSORS = ("error", "density", "calls", "change", "alone_change", "time", "dense_time")
_EXACT = 1e-6


@dataclass
class Statistics:
    """Sums over the calls seen, and what runs showed, fp64 on the CPU.

    Axes: N prompts, P ranges of steps, L layers, H heads, C candidates, G parts of the layers.

    Args:
        error: squared error of a head under a candidate, relative to the squared output of all heads of its layer,
            `[P, L, H, C]`, summed.
        density: share of pairs that the candidate computed, `[P, L, H, C]`, summed.
        calls: calls seen, `[P, L]`.
        change: mean squared change of the picture when a part of the layers runs the probe candidate in a range of
            steps and all else runs dense, `[N, P, G]`; G is 0 where no probes are made.
        alone_change: the same when a candidate runs in all heads, layers and steps, `[N, C]`.
        time: time of attention as a share of dense attention's, `[N, 3, C]`: under a candidate, without ordering; of
            ordering; with the first candidate of a kind in every second head, dense in the others, ordering included.
        dense_time: time of dense attention per time of all else in its step, `[N]`.
        kinds: for each candidate a number that candidates share whose heads run in one call.
        done: prompts that are in the sums.
        probed: prompt, range of steps and part of each probe that is in `change`.
        alone: prompts under which all candidates have run alone.
        seconds: time that the prompts took.
    """

    error: Tensor
    density: Tensor
    calls: Tensor
    change: Tensor
    alone_change: Tensor
    time: Tensor
    dense_time: Tensor
    kinds: tuple[int, ...]
    done: list[int] = field(default_factory=list)
    probed: list[tuple[int, int, int]] = field(default_factory=list)
    alone: list[int] = field(default_factory=list)
    seconds: float = 0.0

    @classmethod
    def empty(
        cls,
        layers: int,
        heads: int,
        candidates: int,
        ranges: int = 1,
        parts: int = 0,
        prompts: int = 1,
        kinds: tuple[int, ...] | None = None,
    ) -> Statistics:
        """Nothing seen. `kinds`: default: each candidate is one of its own."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64)

        sums = (zeros(ranges, layers, heads, candidates), zeros(ranges, layers, heads, candidates))
        runs = (zeros(prompts, ranges, parts), zeros(prompts, candidates), zeros(prompts, 3, candidates))
        kinds = tuple(range(candidates)) if kinds is None else kinds
        return cls(*sums, zeros(ranges, layers), *runs, zeros(prompts), kinds)

    def mean_error(self) -> Tensor:
        """Mean over the calls of the squared relative error, fp64 `[P, L, H, C]`.

        Summed over the heads of a layer it is the squared relative error of the layer.
        """
        return self.error / self.calls.clamp(min=1)[..., None, None]

    def mean_density(self) -> Tensor:
        """Mean over the calls of the density, fp64 `[P, L, H, C]`."""
        return self.density / self.calls.clamp(min=1)[..., None, None]

    @property
    def has_times(self) -> bool:
        """Whether candidates have run alone."""
        return bool(self.alone)

    def mean_time(self, hoisted: bool = False) -> tuple[Tensor, Tensor]:
        """Time of heads as a share of dense attention's, and what each kind adds to a layer that it shares with others.

        Args:
            hoisted: without ordering, which is then done once per pass.

        Returns:
            fp64 `[P, L, H, C]`, in proportion to the densities of the heads; fp64 `[P, L, C]`, the same for candidates
            of one kind. The mean of the first over the heads is the time of a layer.
        """
        times = self.time[self.alone]
        rest, order, _ = times.median(0).values
        alone, density, seen = rest + (0.0 if hoisted else order), self.mean_density(), self.calls > 0
        leads = torch.tensor([self.kinds.index(kind) for kind in self.kinds])
        # The largest: a difference of noisy times must not make it look free.
        mixed = torch.where(times[:, 2] > 0, times[:, 2] - (times[:, 0] + times[:, 1] + 1) / 2, 0.0)
        group = mixed.amax(0).clamp(min=0)[leads]
        over_all = density[seen].mean((0, 1)).clamp(min=1e-12)
        return alone * density / over_all, group.expand(*self.calls.shape, -1)

    @property
    def probe(self) -> int | None:
        """The candidate that probes run: of middling error among those that are not exact; None where all are."""
        error = self.mean_error().sum(2)[self.calls > 0].mean(0)
        ranked = [int(index) for index in error.argsort() if float(error[index]) > _EXACT]
        return ranked[len(ranked) // 2] if ranked else None

    def weight(self) -> Tensor | None:
        """Mean squared change of the picture per squared relative error of a layer, fp64 `[P, L]`; None: not probed.

        Prompts count alike, however much their pictures change.
        """
        if not self.probed or self.probe is None:
            return None
        change = self.change[sorted({number for number, _, _ in self.probed})]
        scale = change.mean((1, 2), keepdim=True).clamp(min=1e-30)
        change = (change / scale).mean(0) * scale.log().mean().exp()
        caused = self.mean_error()[..., self.probe].sum(2)
        weights = torch.zeros_like(caused)
        for part, layers in enumerate(layer_parts(caused.shape[1], self.change.shape[2])):
            weights[:, layers] = (change[:, part] / caused[:, layers].sum(1).clamp(min=1e-12))[:, None]
        return weights

    def effect(self, weight: Tensor) -> Tensor | None:
        """What candidates of a kind change the picture by, over what their errors, so weighed, add up to, fp64 `[C]`.

        Guidance multiplies what differs between its branches, and errors of different calls may be alike; kinds differ
        in both. But no kind counts for less than the one that errs least: pictures that differ much cannot differ in
        proportion. None where no candidate has run alone.

        Args:
            weight: what the squared error of a layer counts for, `[P, L]`.
        """
        if not self.alone:
            return None
        predicted = (self.mean_error().sum(2) * weight[..., None]).sum((0, 1))
        changes = self.alone_change[self.alone]
        found = changes.clamp(min=1e-30).log().mean(0).exp() / predicted.clamp(min=1e-30)
        # Where dense attention is faster, a candidate that would err ran dense.
        errs = (self.mean_error().sum(2)[self.calls > 0].mean(0) > _EXACT) & (changes > 0).all(0)
        effect, least = torch.ones_like(found), (float("inf"), 0.0)
        for kind in set(self.kinds):
            mine = torch.tensor([each == kind for each in self.kinds])
            if (mine & errs).any():
                effect[mine] = found[mine & errs].log().mean().exp()
                least = min(least, (float(predicted[mine & errs].mean()), float(effect[mine][0])))
        return torch.where(errs, effect.clamp(min=least[1]), effect)

    def copy(self) -> Statistics:
        """Sums that can be added to without touching these."""
        tensors = {name: getattr(self, name).clone() for name in _TENSORS}
        return replace(self, **tensors, done=list(self.done), probed=list(self.probed), alone=list(self.alone))

    def save(self, path: Path, settings: dict[str, Any]) -> None:
        """Write to `path`, complete or not at all, with the settings that the sums belong to."""
        tensors = {name: getattr(self, name) for name in _TENSORS}
        told = {"done": self.done, "probed": self.probed, "alone": self.alone, "seconds": self.seconds}
        temporary = path.with_name(path.name + ".tmp")
        path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"format": FORMAT, "settings": settings, "kinds": self.kinds, **told})
        save_file(tensors, temporary, metadata={"head": head})
        os.replace(temporary, path)

    @classmethod
    def load(cls, path: Path, settings: dict[str, Any]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            ConfigError: not such a file, or the sums belong to other settings.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                head = json.loads((file.metadata() or {})["head"])
                sums = [file.get_tensor(name) for name in _TENSORS] if head.get("format") == FORMAT else []
        except (SafetensorError, KeyError, ValueError, OSError) as fault:
            raise ConfigError(str(path), f"cannot be read as statistics of a calibration: {fault}") from None
        found = head.get("settings", {})
        wrong = sorted(key for key in {*settings, *found} if settings.get(key) != found.get(key))
        if head.get("format") != FORMAT or wrong:
            what = ", ".join(wrong) or "format"
            raise ConfigError(
                str(path), f"holds another calibration (differs in {what}); use another file or remove it"
            )
        probed = [(int(number), int(at), int(part)) for number, at, part in head["probed"]]
        named = dict(zip(_TENSORS, sums, strict=True))
        done, alone = list(head["done"]), list(head["alone"])
        kinds, seconds = tuple(head["kinds"]), float(head["seconds"])
        return cls(**named, kinds=kinds, done=done, probed=probed, alone=alone, seconds=seconds)


def layer_parts(layers: int, parts: int) -> list[slice]:
    """Consecutive parts of the layers, as equal as can be; empty ones are left out."""
    bounds = [round(number * layers / parts) for number in range(parts + 1)] if parts else []
    return [slice(start, end) for start, end in pairwise(bounds) if start < end]
