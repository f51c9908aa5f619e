"""CogVideoX pipelines with `from_preset()`."""

from __future__ import annotations

from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

from dit_accel.pipelines.base import FromPreset


class CogVideoXAccelPipeline(FromPreset, CogVideoXPipeline):
    """`diffusers.CogVideoXPipeline` (text to video), accelerated by a preset."""


class CogVideoXAccelImageToVideoPipeline(FromPreset, CogVideoXImageToVideoPipeline):
    """`diffusers.CogVideoXImageToVideoPipeline`, accelerated by a preset."""
