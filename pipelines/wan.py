"""Wan pipelines with `from_preset()`."""

from __future__ import annotations

from typing import ClassVar

from diffusers import WanImageToVideoPipeline, WanPipeline

from dit_accel.pipelines.base import FromPreset


class WanAccelPipeline(FromPreset, WanPipeline):
    """`diffusers.WanPipeline` (text to video), accelerated by a preset."""

    task: ClassVar[str] = "t2v"


class WanAccelImageToVideoPipeline(FromPreset, WanImageToVideoPipeline):
    """`diffusers.WanImageToVideoPipeline`, accelerated by a preset."""

    task: ClassVar[str] = "i2v"
