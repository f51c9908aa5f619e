"""One continuous video from several prompts, without training (DiTCtrl, arXiv 2412.18597), for CogVideoX.

Overlapping clips are denoised in step and blended in their overlaps; in some layers and steps a clip attends with the
keys and values of the clip before it. Not a stream: memory of the latents and time grow with the length.
Axis legend: B batch rows, N joint tokens (text before video), M text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.families.cogvideox import CogVideoXJointAttention
from dit_accel.layout import TextPosition
from dit_accel.pipelines.clip_layout import ClipLayout

_TEXT_TOKENS = 226
_CHUNK_NUMBERS = 1 << 24  # size of the largest temporary of a subject map, in numbers: 64 MiB in fp32
# A pair of clips is one batch: source and target without the prompt, then both with it.
_SOURCE_OF_ROW = (0, 0, 2, 2)
_SOURCE, _TARGET = 2, 3


@dataclass
class Sharing:
    """When a clip attends with the keys and values of the clip before it, and which tokens name the subject.

    Args:
        steps: denoising steps. Default 2 to 24.
        layers: attention layers. Default: the last sixth, 25 to 29 of 30.
        subject: text tokens of the subject. With them, the subject of the target attends the subject of the source, and
            the background the background. Default: none, everything is shared.
        threshold: of the subject map, which is scaled to [0, 1] in every frame. Default 0.3.
    """

    steps: Collection[int] = range(2, 25)
    layers: Collection[int] | None = None
    subject: tuple[int, ...] = ()
    threshold: float = 0.3


@dataclass
class _Control:
    """What the attention processors of a generation ask: it shares, or attends as usual."""

    sharing: Sharing
    modules: list[Any]
    text: int = 0
    frame_tokens: int = 0
    step: int = 0
    _maps: list[Tensor] = field(default_factory=list)

    @property
    def layers(self) -> Collection[int]:
        """Layers that share."""
        count = len(self.modules)
        return range(count - max(1, count // 6), count) if self.sharing.layers is None else self.sharing.layers

    def begin(self, step: int, text: int, frame_tokens: int) -> None:
        """A forward pass over a pair of clips begins."""
        self.step, self.text, self.frame_tokens = step, text, frame_tokens
        self._maps = []

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, dense: Callable[[], Tensor]) -> Tensor:
        """One joint attention call; q, k, v `[B, N, H, D]` after norms and rotary embedding."""
        layer = self.modules.index(module)
        if self.step not in self.sharing.steps:
            return dense()
        if self.sharing.subject:
            self._maps.append(subject_map(q, k, self.text, self.sharing.subject))
        if layer not in self.layers:
            return dense()
        rows = torch.tensor(_SOURCE_OF_ROW, device=q.device)
        k, v = k[rows], v[rows]
        out: Tensor = dispatch_attention_fn(q, k, v)
        if not self.sharing.subject:
            return out
        for row in (1, 3):
            out[row, self.text :] = self._masked(q[row, self.text :], k[row], v[row])
        return out

    def _masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Video queries `[N - M, H, D]` of a target over the keys `[N, H, D]` of its source, subject to subject."""
        source, target = (
            binary_map(torch.stack(self._maps).mean(0)[row], self.frame_tokens, self.sharing.threshold)
            for row in (_SOURCE, _TARGET)
        )
        words = source.new_ones(self.text)
        parts = []
        for chosen in (source, ~source):
            keep = torch.cat([words, chosen])
            parts.append(dispatch_attention_fn(q[None], k[None, keep], v[None, keep])[0])
        return torch.where(target[:, None, None], parts[0], parts[1])


class _SharedAttention(CogVideoXJointAttention):
    """The projections, norms and rotary embedding of the family's processor around `_Control` in place of an engine."""

    def __init__(self, control: _Control) -> None:
        self.control = control

    def attend_joint(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        text: TextPosition,
        mask_is_length: bool = False,
    ) -> Tensor:
        """All `[B, N, H, D]`, text before the video; returns `[B, N, H * D]`."""
        out = self.control.attend(attn, query, key, value, dense=lambda: self.dense(query, key, value, mask))
        return out.flatten(2, 3).type_as(query)


def subject_map(q: Tensor, k: Tensor, text: int, subject: tuple[int, ...]) -> Tensor:
    """Probability of the subject's tokens for each video query, mean over heads, `[B, N - M]`.

    Only `len(subject)` columns of the attention matrix are made; the normaliser is summed query by query chunk.

    Args:
        q, k: `[B, N, H, D]`.
        text: number of text tokens, which stand first.
        subject: indices of text tokens.
    """
    scale, parts = q.shape[-1] ** -0.5, []
    columns, rows = list(subject), max(1, _CHUNK_NUMBERS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for part in q[:, text:].split(rows, dim=1):
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", part.float(), k.float())
        parts.append((scores[..., columns] - scores.logsumexp(-1, keepdim=True)).exp().sum(-1).mean(1))
    return torch.cat(parts, dim=1)


def binary_map(values: Tensor, frame_tokens: int, threshold: float) -> Tensor:
    """Bool `[N - M]`: where values, scaled to [0, 1] in every frame, exceed the threshold."""
    frames = values.view(-1, frame_tokens)
    low, high = frames.amin(-1, keepdim=True), frames.amax(-1, keepdim=True)
    return ((frames - low) / (high - low + 1e-6) > threshold).flatten()


class MultiPromptCogVideoXPipeline(CogVideoXPipeline):
    """`diffusers.CogVideoXPipeline` that also makes one long video from several prompts."""

    @torch.no_grad()
    def generate(
        self,
        prompts: list[str],
        negative_prompt: str = "",
        *,
        height: int | None = None,
        width: int | None = None,
        tile: int = 13,
        overlap: int = 9,
        transitions: int = 2,
        sharing: Sharing | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
    ) -> Any:
        """Generate; the latent frames are `ClipLayout(...).frames`.

        Args:
            prompts: in order. One prompt runs the stock pipeline; repeat a prompt for a longer video of it.
            negative_prompt: default "".
            height, width: pixels. Default: the model's.
            tile, overlap, transitions: see `ClipLayout`.
            sharing: see `Sharing`. Default: its defaults.
            num_inference_steps, guidance_scale: as in the stock pipeline; guidance must be above 1.
            generator: of the noise.
            output_type: "pil", "np", "pt" or "latent".

        Returns:
            Frames in the form of `output_type`, a list with one video, as `CogVideoXPipelineOutput.frames`.

        Raises:
            ConfigError: clips that make no video.
            UnsupportedError: a model whose patches span frames (CogVideoX 1.5), or no guidance.
        """
        layout = ClipLayout(len(prompts), tile, overlap, transitions)
        config = self.transformer.config
        height = height or config.sample_height * self.vae_scale_factor_spatial
        width = width or config.sample_width * self.vae_scale_factor_spatial
        common = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "generator": generator}
        if len(prompts) == 1:
            frames = 1 + (tile - 1) * self.vae_scale_factor_temporal
            size = {"height": height, "width": width, "num_frames": frames, "output_type": output_type}
            return self(prompts[0], negative_prompt, **size, **common).frames
        if config.patch_size_t is not None or guidance_scale <= 1:
            raise UnsupportedError("several prompts need CogVideoX 1.0, whose patches hold one frame, and guidance > 1")
        self._guidance_scale, self._interrupt = guidance_scale, False
        texts = self._texts(prompts, negative_prompt, layout)
        latents = self._denoise(texts, layout, (height, width), sharing or Sharing(), num_inference_steps, generator)
        if output_type == "latent":
            return latents
        return self.video_processor.postprocess_video(video=self.decode_latents(latents), output_type=output_type)

    def _texts(self, prompts: list[str], negative: str, layout: ClipLayout) -> list[tuple[Tensor, Tensor]]:
        """Embeddings `[1, M, C]` of each clip, without and with its prompt."""
        device = self._execution_device
        plain = [
            self.encode_prompt(prompt, negative, True, max_sequence_length=_TEXT_TOKENS, device=device)
            for prompt in prompts
        ]
        texts = []
        for index in range(layout.clips):
            prompt, share = layout.mixture(index)
            words = plain[prompt][0]
            if share:
                words = torch.lerp(words, plain[prompt + 1][0], share)
            texts.append((plain[prompt][1], words))
        return texts

    def _denoise(
        self,
        texts: list[tuple[Tensor, Tensor]],
        layout: ClipLayout,
        size: tuple[int, int],
        sharing: Sharing,
        steps: int,
        generator: torch.Generator | None,
    ) -> Tensor:
        """All clips in step: latents `[1, F, C, h, w]`."""
        device, dtype = self._execution_device, texts[0][1].dtype
        self.scheduler.set_timesteps(steps, device=device)
        height, width = (value // self.vae_scale_factor_spatial for value in size)
        shape = (1, layout.frames, self.transformer.config.in_channels, height, width)
        latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype) * self.scheduler.init_noise_sigma
        rotary = None
        if self.transformer.config.use_rotary_positional_embeddings:
            rotary = self._prepare_rotary_positional_embeddings(*size, layout.tile, device)
        extra, previous, timesteps = self.prepare_extra_step_kwargs(generator, 0.0), None, self.scheduler.timesteps
        frame_tokens = height * width // self.transformer.config.patch_size**2
        with _controlled(self.transformer, sharing) as control, self.progress_bar(total=steps) as bar:
            for step, t in enumerate(timesteps):
                control.begin(step, texts[0][1].shape[1], frame_tokens)
                blended = self._predict(latents, t, texts, layout, rotary, control)
                if isinstance(self.scheduler, CogVideoXDPMScheduler):
                    before = timesteps[step - 1] if step else None
                    latents, previous = self.scheduler.step(
                        blended, previous, t, before, latents, **extra, return_dict=False
                    )
                else:
                    latents = self.scheduler.step(blended, t, latents, **extra, return_dict=False)[0]
                latents = latents.to(dtype)
                bar.update()
        return latents

    def _predict(
        self,
        latents: Tensor,
        t: Tensor,
        texts: list[tuple[Tensor, Tensor]],
        layout: ClipLayout,
        rotary: Any,
        control: Any,
    ) -> Tensor:
        """Guided outputs of all pairs of clips, blended, which is the same as blending their clean predictions."""
        weights = layout.weights().to(latents.device).view(1, -1, 1, 1, 1)
        total = torch.zeros_like(latents, dtype=torch.float32)
        mass = total.new_zeros(1, layout.frames, 1, 1, 1)
        for first in range(layout.clips - 1):
            pair = (first, first + 1)
            x = torch.cat([latents[:, layout.clip(clip)] for clip in pair] * 2)
            words = torch.cat([texts[clip][kind] for kind in (0, 1) for clip in pair])
            control.begin(control.step, control.text, control.frame_tokens)
            out = self.transformer(
                hidden_states=self.scheduler.scale_model_input(x, t),
                encoder_hidden_states=words,
                timestep=t.expand(len(x)),
                image_rotary_emb=rotary,
                return_dict=False,
            )[0].float()
            without, with_prompt = out.chunk(2)
            guided = without + self.guidance_scale * (with_prompt - without)
            for place, clip in enumerate(pair):
                total[:, layout.clip(clip)] += weights * guided[place : place + 1]
                mass[:, layout.clip(clip)] += weights
        return total / mass


@contextmanager
def _controlled(transformer: Any, sharing: Sharing) -> Iterator[_Control]:
    """The transformer with processors that share keys and values; the old ones come back."""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UnsupportedError("several prompts under Diffusers' context parallelism are not supported; disable it")
    modules = [block.attn1 for block in transformer.transformer_blocks]
    old = [module.processor for module in modules]
    control = _Control(sharing, modules)
    processor = _SharedAttention(control)
    try:
        for module in modules:
            module.set_processor(processor)
        yield control
    finally:
        for module, kept in zip(modules, old, strict=True):
            module.set_processor(kept)
