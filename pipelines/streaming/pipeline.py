"""`StreamingWanPipeline`: `diffusers.WanPipeline` whose video starts at once and need not end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import WanPipeline
from PIL import Image, ImageOps
from torch import Tensor

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.models import fit_to_model, load_for_preset
from dit_accel.pipelines.base import FromPreset
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.checkpoints import find_weights, load_causal_weights
from dit_accel.pipelines.streaming.decoder import LatentDecoder, LatentScale, StreamingVaeDecoder
from dit_accel.pipelines.streaming.policies import make_policy
from dit_accel.pipelines.streaming.rolling import make_driver
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.pipelines.streaming.stream import OutputType, VideoStream
from dit_accel.presets import Preset, streaming_preset
from dit_accel.streaming import StreamSettings, stream_preset, stream_settings

_TEXT_TOKENS = 512  # unless the preset says otherwise
_ENCODER_STEP = 4  # AutoencoderKLWan encodes frames four by four after the first, whatever its compression


class StreamingWanPipeline(FromPreset, WanPipeline):
    """A Wan text-to-video pipeline that also streams; `__call__` is still Diffusers' own.

    Good streams need causal few-step weights; the stock ones load and run, and give poor video.

    ```python
    stream = pipe.stream("a red ball moving right", seed=1)
    for chunk in stream:
        show(chunk.frames)
        if chunk.index == 10:
            stream.set_prompt("a blue square moving down")
    ```
    """

    task: ClassVar[str] = "t2v"
    stream_settings: StreamSettings | None = None
    """Settings of streams that name none; from the preset."""
    _runtime: CausalWan | None = None

    @classmethod
    def from_preset(
        cls,
        name: str | Path,
        model: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        checkpoint: str | Path | None = None,
        lora: str | Path | None = None,
        stream: str | None = None,
        **overrides: Any,
    ) -> Any:
        """Load the model of a preset for streaming; its attention method is not applied, since windows are short.

        Args:
            name: preset name or YAML file, of a Wan text-to-video model. Where it names a causal sibling, that is
                loaded unless `model` or `checkpoint` say otherwise.
            model: pipeline folder, hub id, or "tiny": small random weights. Default: the preset's.
            device: torch device. Default: CUDA where there is one, else the CPU.
            dtype: "float32", "bfloat16" or "float16". Default: bfloat16 on CUDA, float32 on the CPU.
            checkpoint: causal weights to load into the transformer, see `load_causal_weights`. Default: none.
            lora: a LoRA to merge into them.
            stream: name in `dit_accel.streaming.STREAM_PRESETS`. Default: the preset's settings.
            overrides: fields of `StreamSettings`.

        Raises:
            ConfigError: another task or family, a model of two transformers, extras that streams do not take, an
                unknown name, wrong settings or no such file, before anything is loaded; or weights that do not fit.
        """
        preset = fit_to_model(streaming_preset(name, model is not None or checkpoint is not None), model)
        check_preset(preset, cls.task)
        if lora is not None and checkpoint is None:
            raise ConfigError("lora", "is merged into a checkpoint; give one")
        for argument, path in (("checkpoint", checkpoint), ("lora", lora)):
            if path is not None:
                find_weights(path, argument)
        settings = _laid_over(preset.stream if stream is None else stream_preset(stream), overrides)
        make_policy(settings)
        pipe = load_for_preset(preset, model, device or "auto", dtype or "auto", cls)
        pipe.preset = preset
        if checkpoint is not None:
            load_causal_weights(pipe.transformer, checkpoint, lora)
        pipe.stream_settings = settings
        return pipe

    def stream(
        self,
        prompt: str,
        *,
        negative_prompt: str | None = None,
        seed: int = 0,
        num_chunks: int | None = None,
        height: int | None = None,
        width: int | None = None,
        settings: StreamSettings | Mapping[str, Any] | None = None,
        start: Any = None,
        policy: Callable[[], DenseContext] | None = None,
        decoder: LatentDecoder | None = None,
        overlap: bool = True,
        output_type: OutputType = "np",
    ) -> VideoStream:
        """Begin a stream.

        Args:
            prompt: what to show.
            negative_prompt: what not to show, for `guidance_scale` above 1. Default: the preset's, or "".
            seed: of the noise; equal seeds give equal streams on one machine.
            num_chunks: chunks to make. Default: endless.
            height, width: pixels, multiples of the autoencoder's compression times the patch. Default: the preset's, or
                480 x 832.
            settings: how to stream, or the values that differ from the pipeline's. Default: the pipeline's.
            start: frames that the video goes on from: a PIL image, a list of 1 + 4 n images, which are cut to the
                proportions of the video and scaled, or normalised latents `[1, C, F, h, w]`.
            policy: makes the attention policy. Default: what the settings name.
            decoder: turns latents into frames. Default: the autoencoder, chunk by chunk without seams.
            overlap: decode beside the cache write on CUDA.
            output_type: "np", "pt" or "latent", see `StreamChunk`.

        Raises:
            ConfigError: a size that the model cannot make, or settings that are wrong.
            UnsupportedError: a transformer that cannot stream, or two of them.
        """
        if self.transformer_2 is not None:
            raise UnsupportedError("streaming: one transformer runs at every noise level, and this pipeline has two")
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError("prompt", f"expected one text per stream, got {prompt!r}")
        chosen = self._settings(settings)
        usual = None if self.preset is None else self.preset.generation
        height = height or (480 if usual is None else usual.height)
        width = width or (832 if usual is None else usual.width)
        if negative_prompt is None:
            negative_prompt = "" if usual is None else usual.negative_prompt
        policy = policy or make_policy(chosen)
        size = self._latent_size(height, width)
        if self._runtime is None or self._runtime.transformer is not self.transformer:
            self._runtime = CausalWan(self.transformer)
        device = self.transformer.device
        negative = self._encode(negative_prompt) if chosen.guidance_scale > 1 else None
        driver = make_driver(
            self._runtime, chosen, self._encode(prompt), size, seed, negative=negative, policy=policy, chunks=num_chunks
        )
        if output_type != "latent" and decoder is None:
            decoder = StreamingVaeDecoder(self.vae)
        first = None if start is None else self._start(start, height, width).to(device)
        return VideoStream(driver, decoder, self._encode, output_type, first, overlap)

    def end_streams(self) -> None:
        """Put Diffusers' attention processors back; streams of this pipeline cannot go on after that."""
        if self._runtime is not None:
            self._runtime.close()
            self._runtime = None

    def _settings(self, settings: StreamSettings | Mapping[str, Any] | None) -> StreamSettings:
        if isinstance(settings, StreamSettings):
            return settings
        return _laid_over(self.stream_settings, settings or {})

    def _latent_size(self, height: int, width: int) -> tuple[int, int]:
        _, *patch = self.transformer.config.patch_size
        for name, value, step in zip(("height", "width"), (height, width), patch, strict=True):
            multiple = self.vae_scale_factor_spatial * step
            if value < multiple or value % multiple:
                near = max(multiple, round(value / multiple) * multiple)
                raise ConfigError(name, f"expected a multiple of {multiple}, got {value}; {near} would do")
        return height // self.vae_scale_factor_spatial, width // self.vae_scale_factor_spatial

    @torch.no_grad()
    def _encode(self, prompt: str) -> Tensor:
        """Embeddings `[1, L, C]` of one prompt."""
        usual = None if self.preset is None else self.preset.generation.max_sequence_length
        embeds: Tensor = self.encode_prompt(
            prompt,
            do_classifier_free_guidance=False,
            max_sequence_length=usual or _TEXT_TOKENS,
            device=self._execution_device,
            dtype=self.transformer.dtype,
        )[0]
        return embeds

    @torch.no_grad()
    def _start(self, start: Any, height: int, width: int) -> Tensor:
        """The frames a stream goes on from, as normalised latents `[1, C, F, h, w]`."""
        if isinstance(start, Tensor) and start.ndim == 5:
            return start
        frames = start if isinstance(start, list | tuple) else [start]
        if (len(frames) - 1) % _ENCODER_STEP:
            raise ConfigError("start", f"expected 1 + {_ENCODER_STEP} n frames, got {len(frames)}")
        fitted = [ImageOps.fit(x, (width, height)) if isinstance(x, Image.Image) else x for x in frames]
        video = self.video_processor.preprocess_video(fitted, height=height, width=width)
        encoded = self.vae.encode(video.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return LatentScale(self.vae).from_vae(encoded).float()


def _laid_over(base: StreamSettings | None, changes: Mapping[str, Any]) -> StreamSettings:
    """The settings with other values in their fields, checked whole."""
    base = base or StreamSettings()
    return stream_settings(**{**base.model_dump(), **changes}) if changes else base


def check_preset(preset: Preset, task: str = StreamingWanPipeline.task) -> None:
    """Refuse a preset that cannot stream, before its model is loaded.

    Streams need one Wan transformer for `task`; of the extras they take quantisation, which happens while weights are
    read.

    Raises:
        ConfigError: names the preset or the extra.
    """
    where = f"preset {preset.name}"
    if (preset.family, preset.task) != ("wan", task):
        raise ConfigError(where, f"is {preset.family} {preset.task}; streams need wan {task}")
    if preset.model.boundary is not None:
        raise ConfigError(
            where,
            f"has a second transformer for noise levels below {preset.model.boundary}, and a stream runs one at all "
            "levels; choose a Wan model with one transformer, for example wan2.1-t2v-1.3b-480p",
        )
    for name in ("cache", "offload", "layerwise_casting", "compile"):
        if getattr(preset.extras, name) is not None:
            raise ConfigError(f"extras.{name}", "streams do without; set it to null in a preset that extends this one")
