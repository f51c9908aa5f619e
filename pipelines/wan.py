"""Wan pipelines with `from_preset()`."""

from __future__ import annotations

from diffusers import WanImageToVideoPipeline, WanPipeline, WanVACEPipeline

from dit_accel.pipelines.base import FromPreset


class WanAccelPipeline(FromPreset, WanPipeline):
    """`diffusers.WanPipeline` (text to video), accelerated by a preset."""


class WanAccelImageToVideoPipeline(FromPreset, WanImageToVideoPipeline):
    """`diffusers.WanImageToVideoPipeline` (first frame, or first and last, to video), accelerated by a preset."""


class WanAccelVACEPipeline(FromPreset, WanVACEPipeline):
    """`diffusers.WanVACEPipeline` (text, reference images and control video to video), accelerated by a preset."""
