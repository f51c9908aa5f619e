"""One continuous video from several prompts, without training (DiTCtrl, arXiv 2412.18597), for CogVideoX.

Overlapping clips are denoised in step and blended in their overlaps; in some layers and steps a clip attends with the
keys and values of the clip before it (`shared_keys.py`). Not a stream: memory of the latents and time grow with the
length.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.pipelines.clip_layout import ClipLayout
from dit_accel.pipelines.shared_keys import Control, Sharing, sharing_keys
from dit_accel.report.records import Report

_TEXT_TOKENS = 226


class MultiPromptCogVideoXPipeline(CogVideoXPipeline):
    """`diffusers.CogVideoXPipeline` that also makes one long video from several prompts.

    `report` holds the attention calls of the latest such video, where `branch` says the pair of clips.
    """

    report: Report | None = None

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
        video: Any = latents
        if output_type != "latent":
            video = self.video_processor.postprocess_video(self.decode_latents(latents), output_type=output_type)
        self.maybe_free_model_hooks()
        return video

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
        with sharing_keys(self.transformer, sharing) as control, self.progress_bar(total=steps) as bar:
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
        self.report = control.report()
        return latents

    def _predict(
        self,
        latents: Tensor,
        t: Tensor,
        texts: list[tuple[Tensor, Tensor]],
        layout: ClipLayout,
        rotary: Any,
        control: Control,
    ) -> Tensor:
        """Guided outputs of all pairs of clips, blended, which is the same as blending their clean predictions."""
        weights = layout.weights().to(latents.device).view(1, -1, 1, 1, 1)
        total = torch.zeros_like(latents, dtype=torch.float32)
        mass = total.new_zeros(1, layout.frames, 1, 1, 1)
        for first in range(layout.clips - 1):
            pair = (first, first + 1)
            x = torch.cat([latents[:, layout.clip(clip)] for clip in pair] * 2)
            words = torch.cat([texts[clip][kind] for kind in (0, 1) for clip in pair])
            control.begin(control.step, control.text, control.frame_tokens, first)
            # Every pair has a context of its own, so that step caches keep apart what they remember of each.
            with self.transformer.cache_context(f"clips {first}", step_index=control.step):
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
