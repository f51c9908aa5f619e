"""The table of tiny pipelines by name: what makes them, and the arguments of a short call."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from dit_accel.errors import ConfigError, near_matches


@dataclass(frozen=True)
class TinyModel:
    """How to make one tiny pipeline, and what it stands for.

    Args:
        family: name of the family in `dit_accel.families`.
        task: "t2v", "i2v", "flf2v", "vace" (control to video), "t2i", "i2i" or "fill".
        pipeline: class of the Diffusers pipeline.
        maker: module of this package and function in it, "module.function".
    """

    family: str
    task: str
    pipeline: str
    maker: str

    @property
    def is_image(self) -> bool:
        """Whether the output is an image rather than a video."""
        return self.task in ("t2i", "i2i", "fill")

    @property
    def takes_image(self) -> bool:
        """Whether the call takes an input image."""
        return self.task in ("i2v", "flf2v", "i2i", "fill")


TINY: dict[str, TinyModel] = {
    "wan2.1-t2v": TinyModel("wan", "t2v", "WanPipeline", "wan.wan21_t2v"),
    "wan2.1-i2v": TinyModel("wan", "i2v", "WanImageToVideoPipeline", "wan.wan21_i2v"),
    "wan2.1-flf2v": TinyModel("wan", "flf2v", "WanImageToVideoPipeline", "wan.wan21_flf2v"),
    "wan2.1-vace": TinyModel("wan", "vace", "WanVACEPipeline", "wan.wan_vace"),
    "wan2.2-t2v-a14b": TinyModel("wan", "t2v", "WanPipeline", "wan.wan22_t2v"),
    "wan2.2-i2v-a14b": TinyModel("wan", "i2v", "WanImageToVideoPipeline", "wan.wan22_i2v"),
    "wan2.2-ti2v-5b": TinyModel("wan", "t2v", "WanPipeline", "wan.wan22_ti2v"),
    "wan2.2-ti2v-5b-i2v": TinyModel("wan", "i2v", "WanImageToVideoPipeline", "wan.wan22_ti2v_i2v"),
    "hunyuan-video": TinyModel("hunyuan-video", "t2v", "HunyuanVideoPipeline", "hunyuan_video.hunyuan_video"),
    "hunyuan-video-i2v": TinyModel(
        "hunyuan-video", "i2v", "HunyuanVideoImageToVideoPipeline", "hunyuan_video.hunyuan_video_i2v"
    ),
    "hunyuan-video-i2v-33ch": TinyModel(
        "hunyuan-video", "i2v", "HunyuanVideoImageToVideoPipeline", "hunyuan_video.hunyuan_video_i2v_33ch"
    ),
    "hunyuan-video-1.5": TinyModel(
        "hunyuan-video-1.5", "t2v", "HunyuanVideo15Pipeline", "hunyuan_video.hunyuan_video15"
    ),
    "hunyuan-video-1.5-i2v": TinyModel(
        "hunyuan-video-1.5", "i2v", "HunyuanVideo15ImageToVideoPipeline", "hunyuan_video.hunyuan_video15_i2v"
    ),
    "flux1-dev": TinyModel("flux", "t2i", "FluxPipeline", "flux.flux1_dev"),
    "flux1-schnell": TinyModel("flux", "t2i", "FluxPipeline", "flux.flux1_schnell"),
    "flux1-kontext": TinyModel("flux", "i2i", "FluxKontextPipeline", "flux.flux1_kontext"),
    "flux1-fill": TinyModel("flux", "fill", "FluxFillPipeline", "flux.flux1_fill"),
    "flux2-dev": TinyModel("flux2", "t2i", "Flux2Pipeline", "flux.flux2_dev"),
    "flux2-dev-edit": TinyModel("flux2", "i2i", "Flux2Pipeline", "flux.flux2_dev"),
    "flux2-klein": TinyModel("flux2", "t2i", "Flux2KleinPipeline", "flux.flux2_klein"),
    "cogvideox-2b": TinyModel("cogvideox", "t2v", "CogVideoXPipeline", "cogvideox.cogvideox_2b"),
    "cogvideox-5b": TinyModel("cogvideox", "t2v", "CogVideoXPipeline", "cogvideox.cogvideox_5b"),
    "cogvideox-5b-i2v": TinyModel("cogvideox", "i2v", "CogVideoXImageToVideoPipeline", "cogvideox.cogvideox_5b_i2v"),
    "cogvideox1.5-5b": TinyModel("cogvideox", "t2v", "CogVideoXPipeline", "cogvideox.cogvideox15_5b"),
    "cogvideox1.5-5b-i2v": TinyModel(
        "cogvideox", "i2v", "CogVideoXImageToVideoPipeline", "cogvideox.cogvideox15_5b_i2v"
    ),
    "ltx-video": TinyModel("generic", "t2v", "LTXPipeline", "ltx.ltx_video"),
    "ltx-2": TinyModel("generic", "t2v", "LTX2Pipeline", "ltx.ltx2"),
    "qwen-image": TinyModel("generic", "t2i", "QwenImagePipeline", "others.qwen_image"),
    "z-image": TinyModel("generic", "t2i", "ZImagePipeline", "others.z_image"),
}


def tiny_names() -> list[str]:
    """Names that `tiny_pipeline` knows."""
    return list(TINY)


def tiny_pipeline(name: str, seed: int = 0) -> Any:
    """A complete Diffusers pipeline with random weights, on the CPU in fp32, the same for a seed.

    Args:
        name: one of `tiny_names()`.
        seed: seed of the weights. The global random state is left as it was.

    Raises:
        ConfigError: an unknown name.
    """
    module, function = _known(name).maker.split(".")
    make = getattr(importlib.import_module(f"dit_accel.samples.tiny_random.{module}"), function)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = make()
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_arguments(name: str, steps: int = 2, seed: int = 0) -> dict[str, Any]:
    """Arguments of a short call of `tiny_pipeline(name)`: prompt, size, steps, a generator, and images where needed.

    Args:
        name: one of `tiny_names()`.
        steps: number of denoising steps. Default 2.
        seed: seed of the generator.

    Raises:
        ConfigError: an unknown name.
    """
    model = _known(name)
    values: dict[str, Any] = {
        "prompt": "a red ball rolls over green grass",
        "num_inference_steps": steps,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "np",
    }
    if model.pipeline != "HunyuanVideo15ImageToVideoPipeline":  # it derives the size from the image
        values |= {"height": 32, "width": 48}
    if not model.is_image:
        values["num_frames"] = 9 if model.family != "wan" else 5
    if model.pipeline == "FluxKontextPipeline":
        values |= {"max_area": 32 * 48, "_auto_resize": False}
    if model.pipeline in ("LTXPipeline", "LTX2Pipeline"):
        values |= {"height": 32, "width": 64}
    if model.pipeline == "LTX2Pipeline":
        values |= {"spatio_temporal_guidance_blocks": [1]}
    if model.family == "flux2":
        values["max_sequence_length"] = 64  # its language models are some 30 layers deep
    values |= _images(model)
    if model.family == "flux2" and model.takes_image:
        values |= {"height": 64, "width": 96, "image": tiny_image(96, 64)}  # it refuses smaller references
    return values


def tiny_image(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    """A random RGB image."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def _images(model: TinyModel) -> dict[str, Any]:
    values: dict[str, Any] = {"image": tiny_image()} if model.takes_image else {}
    if model.task == "flf2v":
        values["last_image"] = tiny_image(seed=1)
    elif model.task == "fill":
        values["mask_image"] = Image.new("L", (48, 32), 255)
    elif model.task == "vace":
        values |= {"video": [tiny_image(seed=i) for i in range(5)], "mask": [Image.new("L", (48, 32), 255)] * 5}
        values["reference_images"] = [tiny_image(seed=9)]
    return values


@cache
def _known(name: str) -> TinyModel:
    if name not in TINY:
        raise ConfigError("model", f"no tiny pipeline is called {name!r}{near_matches(name, TINY)}")
    return TINY[name]
