"""Diffusers pipelines with `from_preset()`: loaded, accelerated, and with the preset's defaults."""

from dit_accel.pipelines.wan import WanAccelImageToVideoPipeline, WanAccelPipeline

__all__ = ["WanAccelImageToVideoPipeline", "WanAccelPipeline"]
