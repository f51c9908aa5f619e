"""What a preset holds. Every value is checked when the preset is loaded, before any model is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dit_accel.errors import ConfigError
from dit_accel.schedule import Schedule

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0)]
Triple = Annotated[
    tuple[Positive, Positive, Positive], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]


class Generation(BaseModel):
    """Defaults of a generation, by Diffusers' names. Sizes in pixels and frames.

    Args:
        height, width, num_frames: size of the result.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        guidance_scale_2: guidance of the second expert, where the model has two.
        fps: frames per second of the written file.
        negative_prompt: default "".
    """

    model_config = _STRICT

    height: Positive
    width: Positive
    num_frames: Positive
    num_inference_steps: Positive
    guidance_scale: Scale
    guidance_scale_2: Scale | None = None
    fps: Positive
    negative_prompt: str = ""


class ModelFacts(BaseModel):
    """What must be known about a model to count tokens and operations without loading it.

    Args:
        layers, heads, head_dim, ffn_dim: of the transformer.
        patch: (frames, height, width) of latent pixels per token.
        vae_temporal, vae_spatial: compression of the autoencoder.
        size_multiple: height and width must be multiples of this.
        text_tokens: keys of the cross-attention, or text tokens of the joint sequence.
    """

    model_config = _STRICT

    layers: Positive
    heads: Positive
    head_dim: Positive
    ffn_dim: Positive
    patch: Triple
    vae_temporal: Positive
    vae_spatial: Positive
    size_multiple: Positive
    text_tokens: Positive = 512


class MethodSpec(BaseModel):
    """A method by name, with its parameters."""

    model_config = _STRICT

    name: str
    parameters: dict[str, Any] = Field(default_factory=dict)


class Preset(BaseModel):
    """A model, how to generate with it, and how to accelerate it.

    Args:
        name: name of the preset, `model` or `model/variant`.
        version: raised when values change.
        description: one line.
        family: family of the transformer ("wan").
        task: "t2v" or "i2v".
        repository: hub id, or "samples/..." for a model that ships with the library.
        generation: defaults of a generation.
        model: facts for estimates.
        method: the method; checked against the registry.
        schedule: when it runs.
        source: where the numbers come from.
    """

    model_config = _STRICT

    name: str
    version: Positive
    description: str
    family: str
    task: Literal["t2v", "i2v"]
    repository: str
    generation: Generation
    model: ModelFacts
    method: MethodSpec
    schedule: Schedule = Schedule()
    source: str

    def to_yaml(self) -> str:
        """The resolved preset as YAML; loading it gives an equal preset."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)


def check_size(model: ModelFacts, generation: Generation, where: str = "generation") -> None:
    """Refuse a size that the model cannot make; `where` is the dotted path of the values.

    Raises:
        ConfigError: names the argument, what fits near it, and what was got.
    """
    for name, value in (("height", generation.height), ("width", generation.width)):
        near = max(model.size_multiple, round(value / model.size_multiple) * model.size_multiple)
        if value % model.size_multiple:
            raise ConfigError(
                f"{where}.{name}", f"expected a multiple of {model.size_multiple}, got {value}; {near} would do"
            )
    frames, factor = generation.num_frames, model.vae_temporal
    if (frames - 1) % factor:
        near = round((frames - 1) / factor) * factor + 1
        raise ConfigError(
            f"{where}.num_frames", f"expected 1 plus a multiple of {factor}, got {frames}; {near} would do"
        )
