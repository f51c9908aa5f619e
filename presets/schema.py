"""What a preset holds. Every value is checked when the preset is loaded, before any model is."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from dit_accel.errors import ConfigError
from dit_accel.extras.settings import Extras
from dit_accel.schedule import Schedule
from dit_accel.streaming import StreamSettings

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
Positive = Annotated[int, Field(ge=1)]
Scale = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Triple = Annotated[
    tuple[Positive, Positive, Positive], BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)
]
Task = Literal["t2v", "i2v", "flf2v", "vace", "t2i", "i2i", "fill"]


class Inputs(NamedTuple):
    """What a task takes besides the prompt, as options of the command line.

    Args:
        required: must be given.
        optional: may be given.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


TASK_INPUTS: dict[str, Inputs] = {
    "t2v": Inputs(),
    "i2v": Inputs(("image",)),
    "flf2v": Inputs(("image", "last_image")),
    "vace": Inputs((), ("image", "video")),
    "t2i": Inputs(),
    "i2i": Inputs(("image",)),
    "fill": Inputs(("image", "mask")),
}
IMAGE_TASKS = ("t2i", "i2i", "fill")


class Generation(BaseModel):
    """Defaults of a generation, by Diffusers' names. Sizes in pixels and frames.

    Args:
        height, width: size of the result.
        num_frames: frames of a video. Default 1: an image.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance, or the embedded guidance of a distilled model. Default: the
            pipeline's own.
        guidance_scale_2: guidance of the second expert, where the model has two.
        true_cfg_scale: classifier-free guidance on top of the embedded one. Default: the pipeline's own (off).
        max_sequence_length: text tokens. Default: the pipeline's own.
        fps: frames per second of the written file. Default 1: an image.
        negative_prompt: default "".
    """

    model_config = _STRICT

    height: Positive
    width: Positive
    num_frames: Positive = 1
    num_inference_steps: Positive
    guidance_scale: Scale | None = None
    guidance_scale_2: Scale | None = None
    true_cfg_scale: Scale | None = None
    max_sequence_length: Positive | None = None
    fps: Positive = 1
    negative_prompt: str = ""


class ModelFacts(BaseModel):
    """What must be known about a model to count tokens and operations without loading it.

    Args:
        layers, heads, head_dim: of the transformer's self-attention or joint attention.
        ffn_dim: width of a two-matrix feed-forward layer; a gated one counts 3/2 of its width.
        patch: (frames, height, width) of latent pixels per token.
        vae_temporal, vae_spatial: compression of the autoencoder.
        size_multiple: height and width must be multiples of this.
        text: where text stands: "cross" (cross-attention), or "before" or "after" the video in one sequence.
        text_tokens: keys of the cross-attention, or text tokens of the joint sequence.
        references: reference images of the result's size that stand in the sequence. Default 0.
        flow_shift: shift of the noise schedule at the preset's size, as the model's publishers run it. Loading the
            preset sets it in the scheduler, whose published file may say otherwise (one file serves all sizes). Where
            the scheduler derives its shift from the length of the sequence (FLUX), what it derives. Default None: the
            scheduler's own, or none: noise falls evenly.
        boundary: noise level below which the second expert runs. Default None: there is one transformer.
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
    text: Literal["cross", "before", "after"] = "cross"
    text_tokens: Positive = 512
    references: Annotated[int, Field(ge=0)] = 0
    flow_shift: Annotated[float, Field(gt=0)] | None = None
    boundary: Share | None = None


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
        pipeline: Diffusers class of the pipeline ("WanPipeline").
        task: what is made from what: "t2v", "i2v", "flf2v" (first and last frame), "vace", "t2i", "i2i", "fill".
        repository: hub id, or "samples/..." for a model that ships with the library.
        tiny: name of the tiny random pipeline of the same structure, for smoke tests.
        generation: defaults of a generation.
        model: facts for estimates.
        method: the method; checked against the registry.
        schedule: when it runs.
        schedule_2: when it runs in `transformer_2`, the low-noise expert. Default None: as `schedule` says.
        extras: Diffusers' own features to switch on: step cache, offload, casting, compilation, quantisation.
        stream: how the model streams, for causal weights. Default None: it was not made for streaming.
        causal: name of the preset of the same model trained to stream; streams are made with it. Default None.
        source: where the numbers come from.
    """

    model_config = _STRICT

    name: str
    version: Positive
    description: str
    family: str
    pipeline: str
    task: Task
    repository: str
    tiny: str
    generation: Generation
    model: ModelFacts
    method: MethodSpec
    schedule: Schedule = Schedule()
    schedule_2: Schedule | None = None
    extras: Extras = Extras()
    stream: StreamSettings | None = None
    causal: str | None = None
    source: str

    @property
    def makes_image(self) -> bool:
        """Whether the result is an image."""
        return self.task in IMAGE_TASKS

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


def check_task(task: str, boundary: float | None, generation: Generation, has_schedule_2: bool) -> None:
    """Refuse values that the task or the model has no use for.

    Raises:
        ConfigError: frames or a frame rate for an image, none for a video, a second expert's values without one.
    """
    is_image = task in IMAGE_TASKS
    if is_image and generation.num_frames != 1:
        raise ConfigError("generation.num_frames", f"task {task} makes one image, got {generation.num_frames}")
    if is_image and generation.fps != 1:
        raise ConfigError("generation.fps", f"task {task} makes one image, which has no frame rate")
    for name, given in (
        ("generation.guidance_scale_2", generation.guidance_scale_2 is not None),
        ("schedule_2", has_schedule_2),
    ):
        if given and boundary is None:
            raise ConfigError(name, "is for models with two experts; this one has one transformer")
