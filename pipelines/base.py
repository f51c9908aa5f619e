"""What all wrappers share: a Diffusers pipeline that is made from a preset."""

from __future__ import annotations

from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

from dit_accel.acceleration import Acceleration, accelerate
from dit_accel.errors import ConfigError
from dit_accel.models import load_pipeline
from dit_accel.presets import Preset, load_preset

_NOT_FOR_CALLS = ("fps",)


class FromPreset:
    """Mixin over a Diffusers pipeline class: `from_preset`, and the preset's values where a call leaves them out."""

    task: ClassVar[str]
    preset: Preset | None = None
    acceleration: Acceleration | None = None

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
            model: pipeline folder or hub id. Default: the preset's.
            device: torch device. Default: CUDA where there is one, else the CPU.
            dtype: "float32", "bfloat16" or "float16". Default: bfloat16 on CUDA, float32 on the CPU.
            overrides: passed to `accelerate` (`method`, `density`, `dense_steps`, ...).

        Raises:
            ConfigError: the preset does not exist, is for another task, or its model cannot be loaded.
        """
        preset = load_preset(name)
        if preset.task != cls.task:
            raise ConfigError(f"preset {preset.name}", f"is for task {preset.task!r}; {cls.__name__} is {cls.task!r}")
        pipe = load_pipeline(model or preset.repository, device or "auto", dtype or "auto", cls)
        pipe.preset = preset
        pipe.acceleration = accelerate(pipe, preset, **overrides)
        return pipe

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save as the Diffusers pipeline that this is, so that plain Diffusers loads it again."""
        stock = next(cls for cls in type(self).__mro__ if cls.__module__.startswith("diffusers."))
        config = {key: value for key, value in self.config.items() if key in signature(stock).parameters}  # type: ignore[attr-defined]
        stock(**{**config, **self.components}).save_pretrained(*args, **kwargs)  # type: ignore[attr-defined]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Generate, as the Diffusers pipeline does; arguments left out take the preset's values."""
        if self.preset is not None:
            values = self.preset.generation.model_dump(exclude_none=True)
            defaults = {key: value for key, value in values.items() if key not in _NOT_FOR_CALLS}
            if "negative_prompt_embeds" in kwargs:
                defaults.pop("negative_prompt")
            kwargs = {**defaults, **kwargs}
        return super().__call__(*args, **kwargs)  # type: ignore[misc]
