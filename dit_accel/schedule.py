"""When and where the method runs: dense steps, noise windows and layers, refresh, and overrides per layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dit_accel.errors import ConfigError
from dit_accel.head_table import HeadTable
from dit_accel.methods.registry import config_error


def _ranges(value: Any) -> Any:
    """Accept `n` for "the first n" and a single `[start, end]` besides a list of half-open ranges."""
    if isinstance(value, int) and not isinstance(value, bool):
        return ((0, value),) if value else ()
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            value = [value]
        return tuple(tuple(pair) if isinstance(pair, list) else pair for pair in value)
    return value


def _numbers(value: Any) -> Any:
    """Accept one number for a list with one, and a list for a tuple."""
    if isinstance(value, int) and not isinstance(value, bool):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


NonNegative = Annotated[int, Field(ge=0)]
Level = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
StepRanges = Annotated[tuple[tuple[NonNegative, NonNegative], ...], BeforeValidator(_ranges)]
NoiseWindows = Annotated[tuple[tuple[Level, Level], ...], BeforeValidator(_ranges)]


def _check_ranges(name: str, ranges: tuple[tuple[float, float], ...]) -> None:
    for low, high in ranges:
        if low >= high:
            raise ValueError(f"{name}: expected half-open ranges [low, high) with low < high, got [{low}, {high})")
    ordered = sorted(ranges)
    for (_, end), (start, stop) in pairwise(ordered):
        if start < end:
            raise ValueError(f"{name}: the range [{start}, {stop}) overlaps one that ends at {end}")


class Override(BaseModel):
    """Other parameters of the method for some layers.

    Args:
        layers: half-open ranges of layers, `[[0, 4], [10, 12]]`; `n` means the first n.
        parameters: parameters of the preset's method to replace, for example `{density: 0.5}`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    layers: StepRanges
    parameters: dict[str, Any]


class Schedule(BaseModel):
    """When a call runs dense, and how long a plan is kept.

    Steps and layers count from 0; every range is half-open, `[start, end)`. An integer n means `[0, n)`.

    Args:
        dense_steps: step ranges that run dense. Default none.
        dense_noise: noise-level windows `[low, high)` in [0, 1] that run dense (1 = pure noise; a window that ends at
            1 includes it). They survive a change of the step count, which step ranges do not. Default none.
        dense_layers: layer ranges that run dense. Default none.
        refresh: a plan that depends on q and k is made anew every `refresh` sparse steps. Default 1: at every step.
        search_steps: instead of `refresh`: plans are made at the first executed step from each of these on, and used
            until the next (arXiv 2502.21079; with one step arXiv 2509.24014). In a step that runs dense the plan is
            made from its q and k and the output stays dense. A sparse step without a plan makes one. Not for methods
            that hold their plans themselves (the remainder "history"). Default none.
        layer_groups: layer ranges, `[[0, 4], [4, 8]]`, that use the plan of their first sparse layer. Default none.
        layer_heads: which plan the other layers of a group use: "union": for all heads what any head of the first
            layer keeps, as heads of different layers have nothing in common (arXiv 2510.09883); "index": that of the
            head with the same number. Default "union".
        head_groups: plans are made for this many representatives, the means of neighbouring heads, and used by all
            (arXiv 2509.24745). It must divide the heads. Default None: every head has its own.
        min_tokens: shorter sequences run dense. Default 0.
        overrides: other method parameters for some layers; a layer may stand in one override only.
        head_table: which method, with which parameters, each head runs under: the path of a file written by
            `HeadTable.save`, or its contents. Default None: all heads of a layer run under the same method.
        max_error: budget for the relative error of a call's output. A sample of under 1 % of the rows is computed
            exactly in sparse calls; where the upper bound of the error is over the budget, the layer gets more
            density, or runs dense, from the next step on (see `guard`). Default None: nothing is checked.

    Raises:
        ConfigError: through `make`, by dotted path, when a value is wrong or ranges overlap.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    dense_steps: StepRanges = ()
    dense_noise: NoiseWindows = ()
    dense_layers: StepRanges = ()
    refresh: Annotated[int, Field(ge=1)] = 1
    search_steps: Annotated[tuple[NonNegative, ...], BeforeValidator(_numbers)] = ()
    layer_groups: StepRanges = ()
    layer_heads: Literal["union", "index"] = "union"
    head_groups: Annotated[int, Field(ge=1)] | None = None
    min_tokens: NonNegative = 0
    overrides: Annotated[tuple[Override, ...], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)] = ()
    head_table: Annotated[HeadTable | None, BeforeValidator(lambda v: None if v is None else HeadTable.make(v))] = None
    max_error: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ranges_are_disjoint(self) -> Schedule:
        _check_ranges("dense_steps", self.dense_steps)
        _check_ranges("dense_noise", self.dense_noise)
        _check_ranges("dense_layers", self.dense_layers)
        _check_ranges("overrides", tuple(r for override in self.overrides for r in override.layers))
        _check_ranges("layer_groups", self.layer_groups)
        return self

    @model_validator(mode="after")
    def _reuse_is_possible(self) -> Schedule:
        if self.search_steps and self.refresh > 1:
            raise ValueError("search_steps and refresh both say when plans are made: give one of them")
        if list(self.search_steps) != sorted(set(self.search_steps)):
            raise ValueError(f"search_steps: expected ascending steps, each once, got {list(self.search_steps)}")
        if self.head_table is not None and (self.layer_groups or self.head_groups):
            raise ValueError(
                "head_table gives every layer its own groups of heads: leave out layer_groups and head_groups"
            )
        return self

    @classmethod
    def make(cls, path: str = "schedule", **values: Any) -> Schedule:
        """Validate `values` and return the schedule; faults are `ConfigError`s under `path`."""
        try:
            return cls(**values)
        except ValidationError as error:
            raise config_error(error, path, list(cls.model_fields)) from None

    def dense_reason(self, layer: int, step: int, noise: float, tokens: int) -> str | None:
        """Why this call must run dense, in one clause, or None when the method may run."""
        for start, end in self.dense_layers:
            if start <= layer < end:
                return f"layer {layer} is in dense_layers [{start}, {end})"
        for start, end in self.dense_steps:
            if start <= step < end:
                return f"step {step} is in dense_steps [{start}, {end})"
        for low, high in self.dense_noise:
            if low <= noise < high or (noise >= 1 and high >= 1):
                return f"noise {noise:.3f} is in dense_noise [{low}, {high})"
        if tokens < self.min_tokens:
            return f"{tokens} tokens are fewer than min_tokens {self.min_tokens}"
        return None

    @property
    def keeps_plans(self) -> bool:
        """Whether a plan outlives the step that made it."""
        return self.refresh > 1 or bool(self.search_steps)

    def keeps(self, made: int, step: int) -> bool:
        """Whether a plan made at step `made` serves step `step`."""
        if self.search_steps:
            return made <= step and not any(made < at <= step for at in self.search_steps)
        return 0 <= step - made < self.refresh

    def searches(self, layer: int, step: int, tokens: int) -> bool:
        """Whether a call that runs dense for its step or noise level makes a plan for the steps that follow."""
        begun = any(at <= step for at in self.search_steps)
        is_dense_layer = any(start <= layer < end for start, end in self.dense_layers)
        return begun and not is_dense_layer and tokens >= self.min_tokens

    def layer_group(self, layer: int) -> int | None:
        """First layer of the group that `layer` shares its plan with; None when it plans alone."""
        return next((start for start, end in self.layer_groups if start <= layer < end), None)

    def parameters_for(self, layer: int) -> dict[str, Any]:
        """Method parameters that replace the common ones in `layer`; empty for most layers."""
        for override in self.overrides:
            if any(start <= layer < end for start, end in override.layers):
                return override.parameters
        return {}


ALL_DENSE = Schedule(min_tokens=2**62)
"""Keeps every call dense, by the fastest dense attention, which the dense steps of other schedules take too: what they
are to be compared with. The method `dense` is the model as it is without this library."""

__all__ = ["ALL_DENSE", "ConfigError", "Override", "Schedule"]
