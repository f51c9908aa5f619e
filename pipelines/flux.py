"""FLUX pipelines with `from_preset()`."""

from __future__ import annotations

from diffusers import Flux2KleinPipeline, Flux2Pipeline, FluxFillPipeline, FluxKontextPipeline, FluxPipeline

from dit_accel.pipelines.base import FromPreset


class FluxAccelPipeline(FromPreset, FluxPipeline):
    """`diffusers.FluxPipeline` (text to image: dev and schnell), accelerated by a preset."""


class FluxAccelKontextPipeline(FromPreset, FluxKontextPipeline):
    """`diffusers.FluxKontextPipeline` (image editing), accelerated by a preset."""


class FluxAccelFillPipeline(FromPreset, FluxFillPipeline):
    """`diffusers.FluxFillPipeline` (inpainting), accelerated by a preset."""


class Flux2AccelKleinPipeline(FromPreset, Flux2KleinPipeline):
    """`diffusers.Flux2KleinPipeline` (text to image in a few steps), accelerated by a preset."""


class Flux2AccelPipeline(FromPreset, Flux2Pipeline):
    """`diffusers.Flux2Pipeline` (text to image), accelerated by a preset."""
