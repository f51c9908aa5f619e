"""HunyuanVideo and HunyuanVideo 1.5 pipelines with `from_preset()`."""

from __future__ import annotations

from diffusers import (
    HunyuanVideo15ImageToVideoPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoImageToVideoPipeline,
    HunyuanVideoPipeline,
)

from dit_accel.pipelines.base import FromPreset


class HunyuanVideoAccelPipeline(FromPreset, HunyuanVideoPipeline):
    """`diffusers.HunyuanVideoPipeline` (text to video), accelerated by a preset."""


class HunyuanVideoAccelImageToVideoPipeline(FromPreset, HunyuanVideoImageToVideoPipeline):
    """`diffusers.HunyuanVideoImageToVideoPipeline`, accelerated by a preset."""


class HunyuanVideo15AccelPipeline(FromPreset, HunyuanVideo15Pipeline):
    """`diffusers.HunyuanVideo15Pipeline` (text to video), accelerated by a preset; its guider takes the guidance."""


class HunyuanVideo15AccelImageToVideoPipeline(FromPreset, HunyuanVideo15ImageToVideoPipeline):
    """`diffusers.HunyuanVideo15ImageToVideoPipeline`, accelerated by a preset; the size follows the image."""
