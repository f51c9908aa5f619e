"""What all wrappers share: a Diffusers pipeline that is made from a preset."""

from __future__ import annotations

from functools import wraps
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_accel.acceleration import accelerate
from dit_accel.errors import ConfigError
from dit_accel.handle import Acceleration
from dit_accel.kernels.registry import check_backend
from dit_accel.models import call_arguments, fit_to_model, load_for_preset, set_guider
from dit_accel.presets import Preset, load_preset
from dit_accel.resolve import resolve_policy

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline as _Pipeline
else:
    # At run time the pipeline is the other base of each wrapper.
    _Pipeline = object


# Arguments of `accelerate` that are neither a method nor when it runs.
_SETTINGS_BESIDE = ("schedule_2", "backend", "break_even", "seed", "hoist", "family")


class FromPreset(_Pipeline):
    """Mixin over a Diffusers pipeline class: `from_preset`, and the preset's values where a call leaves them out."""

    preset: Preset | None = None
    acceleration: Acceleration | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Give the wrapper's call the signature and the documentation of the Diffusers pipeline's."""
        super().__init_subclass__(**kwargs)
        wrapper: Any = cls
        if "__call__" not in cls.__dict__:

            @wraps(cls.stock_class().__call__)
            def call(self: Any, *args: Any, **kwargs: Any) -> Any:
                return super(cls, self).__call__(*args, **kwargs)

            wrapper.__call__ = call

    @classmethod
    def from_preset(
        cls,
        name: str | Path,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **overrides: Any,
    ) -> Any:
        """Load the preset's model, accelerate it, and take over its generation defaults.

        Args:
            name: preset name or YAML file.
            model: pipeline folder, hub id, or "tiny" for random weights without a download, which run at a size of
                their own. Default: the preset's.
            device: torch device. Default: CUDA where there is one, else the CPU.
            dtype: "float32", "bfloat16" or "float16". Default: bfloat16 on CUDA, float32 on the CPU.
            overrides: passed to `accelerate` (`method`, `density`, `dense_steps`, ...).

        Raises:
            ConfigError: the preset does not exist or is for another pipeline, an override is wrong (before anything is
                loaded), or the model cannot be loaded.
            UnsupportedError: an extra of the preset cannot work on this model or machine.
        """
        preset = fit_to_model(load_preset(name), model)
        if preset.pipeline != cls.stock_class().__name__:
            raise ConfigError(
                f"preset {preset.name}", f"is for {preset.pipeline}; {cls.__name__} is {cls.stock_class().__name__}"
            )
        given = {key: value for key, value in overrides.items() if key not in _SETTINGS_BESIDE}
        # A misspelt parameter shows here, not after a model has been loaded.
        check_backend(overrides.get("backend", "auto"))
        asked = given.pop("method", None), given.pop("schedule", None)
        resolve_policy(preset, *asked, given, overrides.get("schedule_2"))
        pipe = load_for_preset(preset, model, device or "auto", dtype or "auto", cls)
        pipe.preset = preset
        set_guider(pipe, preset.generation)
        pipe.acceleration = accelerate(pipe, preset, offload_to=device, **overrides)
        return pipe

    @classmethod
    def stock_class(cls) -> Any:
        """The Diffusers pipeline class that this wraps."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("diffusers."))

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Diffusers pipeline that this is, so that plain Diffusers loads it again."""
        stock = self.stock_class()
        config = {key: value for key, value in self.config.items() if key in signature(stock).parameters}
        stock(**{**config, **self.components}).save_pretrained(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as the Diffusers pipeline does; arguments left out take the preset's values."""
        if self.preset is not None:
            # What is given by position is given, too.
            given = dict(zip(signature(self.stock_class().__call__).parameters, (self, *args), strict=False))
            # From the size, others are derived (the area of Kontext's image).
            size = {name: value for name in ("height", "width") if (value := {**given, **kwargs}.get(name)) is not None}
            defaults = call_arguments(self, self.preset.generation.model_copy(update=size))
            if "negative_prompt_embeds" in kwargs:
                defaults.pop("negative_prompt", None)
            kwargs = {**{key: value for key, value in defaults.items() if key not in given}, **kwargs}
        return super().__call__(*args, **kwargs)
