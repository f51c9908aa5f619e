"""How a stream is made: noise ladder, chunk, window, sink and positions. Values only; nothing is loaded here."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from dit_accel.errors import ConfigError

Positions = Literal["absolute", "reindex", "sink_adjacent"]
Sampler = Literal["renoise", "euler"]
Recache = Literal["released", "causal"]
_FROM_LIST = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
Count = Annotated[int, Field(ge=1)]
BLEND_CHUNKS = 4
"""Chunks in which a prompt blends into the next where nobody says how many."""
Timestep = Annotated[float, Field(gt=0, le=1000)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Frequencies(BaseModel):
    """Change of the temporal rotary frequencies for streams longer than the training clips.

    "by_parts" is our reading of frequency-aware length extension (arXiv 2602.14027, whose formulas are not public) in
    the manner of YaRN (arXiv 2309.00071): pairs that make fewer than `low` turns in `trained` frames are interpolated
    by `target / trained`, those with more than `high` are left alone, with a ramp between. "riflex" (arXiv
    2502.15894) changes one pair alone: the one whose period is nearest to `period`, to 0.9 turns in `target` frames.

    Args:
        mode: "none", "by_parts" or "riflex". Default "none".
        trained: latent frames of the training clips. Default 21.
        target: latent frames for which the positions are stretched. Default 126.
        low, high: turns in training, for "by_parts". Defaults 0.25 and 1.
        period: observed repetition length in latent frames, for "riflex". Default: `trained`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    mode: Literal["none", "by_parts", "riflex"] = "none"
    trained: Count = 21
    target: Count = 126
    low: Annotated[float, Field(ge=0)] = 0.25
    high: Annotated[float, Field(gt=0)] = 1.0
    period: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Frequencies:
        if self.low >= self.high:
            raise ValueError(f"low must be below high, got {self.low} and {self.high}")
        return self


class StreamAttention(BaseModel):
    """How a chunk attends to the frames that it sees.

    Args:
        name: "dense", "light_forcing", "flashblock", "compressed_memory", or a method of the library, which then runs
            inside the window. Default "dense".
        parameters: of the policy or method, by name. Default: its defaults.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(min_length=1)] = "dense"
    parameters: dict[str, Any] = Field(default_factory=dict)


class StreamSettings(BaseModel):
    """How a causal video model streams. Frames are latent frames; the defaults are Self-Forcing's (arXiv 2506.08009).

    Args:
        steps: timesteps of a chunk, from noisy to clean, in (0, 1000].
        warp: whether `shift` still has to be applied to `steps`. Default True.
        shift: flow shift.
        chunk: frames denoised together.
        first_chunk: frames of the very first chunk. Default: `chunk`.
        window: frames a chunk may attend, sink and its own included. None: all (memory grows with the stream).
        sink: leading frames that stay for ever. Default 0.
        positions: "absolute": index in the scene, as in training, bounded by the model's position table; "reindex":
            place in the cache (arXiv 2309.17453), endless; "sink_adjacent": absolute, with the sink moved directly
            before the oldest other frame (arXiv 2509.25161), endless too.
        sink_decay: share of the sink that an evicted frame replaces (arXiv 2512.04678). Default 0: the sink is frozen.
        context_noise: timestep at which a finished chunk is run once more to write its keys and values. Default 0.
        sampler: "renoise": predict the clean chunk, then add fresh noise (distilled models); "euler": ODE step
            (models that were not distilled).
        guidance_scale: classifier-free guidance; above 1 runs a second cache for the negative prompt. Default 1.
        keep_sink: whether a recache leaves the sink as it is. Default True.
        recache: "released": one pass in which the repeated frames see each other, as the published weights were
            made for; "causal": chunk by chunk.
        rolling: chunks denoised together at rising noise levels (Rolling Forcing), one per entry of `steps`.
        antiphase: correlation -rho between the initial noise of neighbouring frames. Default 0: independent.
        frequencies: change of the temporal rotary frequencies.
        attention: to what a chunk sees. Default: dense.

    Raises:
        ValueError: steps that do not fall, or a window too small for the sink and a chunk, or the first chunk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    steps: Annotated[tuple[Timestep, ...], _FROM_LIST, Field(min_length=1)] = (1000.0, 750.0, 500.0, 250.0)
    warp: bool = True
    shift: Annotated[float, Field(gt=0)] = 5.0
    chunk: Count = 3
    first_chunk: Count | None = None
    window: Count | None = 21
    sink: Annotated[int, Field(ge=0)] = 0
    positions: Positions = "absolute"
    sink_decay: Share = 0.0
    context_noise: Annotated[float, Field(ge=0, le=1000)] = 0.0
    sampler: Sampler = "renoise"
    guidance_scale: Annotated[float, Field(ge=0)] = 1.0
    keep_sink: bool = True
    recache: Recache = "released"
    rolling: bool = False
    antiphase: Share = 0.0
    frequencies: Frequencies = Frequencies()
    attention: StreamAttention = StreamAttention()

    @model_validator(mode="after")
    def _check(self) -> StreamSettings:
        if any(later >= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)):
            raise ValueError(f"steps must fall, got {self.steps}")
        own = self.chunk * (len(self.steps) if self.rolling else 1)
        if self.window is not None and self.window < self.sink + own:
            raise ValueError(f"window must hold the sink and what is denoised together, {self.sink} + {own} frames")
        if self.window is not None and self.first_chunk is not None and self.window < self.first_chunk:
            raise ValueError(f"window must hold first_chunk, {self.first_chunk} frames, got {self.window}")
        if self.sink_decay and self.positions == "absolute":
            raise ValueError("sink_decay averages keys, which must not be rotated yet: use positions='reindex'")
        if self.rolling and (self.sampler != "renoise" or self.window is None or self.first_chunk is not None):
            raise ValueError("rolling needs sampler='renoise', a window, and chunks of one size")
        return self


def stream_settings(path: str = "stream", **values: object) -> StreamSettings:
    """Make settings from names and values.

    Args:
        path: dotted path for the message of an error.
        values: fields of `StreamSettings`; integers are accepted as timesteps.

    Raises:
        ConfigError: unknown key, wrong type, or values that do not go together.
    """
    from dit_accel.methods.registry import config_error

    try:
        return StreamSettings.model_validate(values)
    except ValidationError as error:
        raise config_error(error, path, list(StreamSettings.model_fields)) from None


STREAM_PRESETS: dict[str, StreamSettings] = {
    "self-forcing": StreamSettings(),
    "causvid": StreamSettings(steps=(1000.0, 757.0, 522.0), warp=False, shift=8.0),
    "longlive": StreamSettings(window=12, sink=3),
    "longlive-endless": StreamSettings(window=12, sink=3, positions="reindex"),
    "infinity-rope": StreamSettings(window=6, sink=1, positions="reindex"),
    "reward-forcing": StreamSettings(window=12, sink=3, positions="reindex", sink_decay=0.001),
    "rolling-forcing": StreamSettings(
        steps=(1000.0, 800.0, 600.0, 400.0, 200.0), window=21, sink=3, positions="sink_adjacent", rolling=True
    ),
    "flex-style": StreamSettings(window=21, sink=3, antiphase=0.1, frequencies=Frequencies(mode="by_parts")),
}
"""Published settings; docs/streaming.md says where they come from."""


def stream_preset(name: str) -> StreamSettings:
    """One of `STREAM_PRESETS`.

    Raises:
        ConfigError: no such name; the message offers near matches.
    """
    from dit_accel.errors import near_matches

    if name not in STREAM_PRESETS:
        raise ConfigError("stream", f"unknown settings {name!r}{near_matches(name, STREAM_PRESETS)}")
    return STREAM_PRESETS[name]
