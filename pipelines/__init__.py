"""Diffusers pipelines with `from_preset()`: loaded, accelerated, and with the preset's defaults."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dit_accel.pipelines.cogvideox import CogVideoXAccelImageToVideoPipeline, CogVideoXAccelPipeline
    from dit_accel.pipelines.flux import (
        Flux2AccelKleinPipeline,
        Flux2AccelPipeline,
        FluxAccelFillPipeline,
        FluxAccelKontextPipeline,
        FluxAccelPipeline,
    )
    from dit_accel.pipelines.hunyuan_video import (
        HunyuanVideo15AccelImageToVideoPipeline,
        HunyuanVideo15AccelPipeline,
        HunyuanVideoAccelImageToVideoPipeline,
        HunyuanVideoAccelPipeline,
    )
    from dit_accel.pipelines.streaming import StreamingWanPipeline
    from dit_accel.pipelines.wan import WanAccelImageToVideoPipeline, WanAccelPipeline, WanAccelVACEPipeline

# Imported on first use, since each brings a Diffusers pipeline and its text encoders with it.
_WRAPPERS = {
    "CogVideoXAccelImageToVideoPipeline": "cogvideox",
    "CogVideoXAccelPipeline": "cogvideox",
    "Flux2AccelKleinPipeline": "flux",
    "Flux2AccelPipeline": "flux",
    "FluxAccelFillPipeline": "flux",
    "FluxAccelKontextPipeline": "flux",
    "FluxAccelPipeline": "flux",
    "HunyuanVideo15AccelImageToVideoPipeline": "hunyuan_video",
    "HunyuanVideo15AccelPipeline": "hunyuan_video",
    "HunyuanVideoAccelImageToVideoPipeline": "hunyuan_video",
    "HunyuanVideoAccelPipeline": "hunyuan_video",
    "StreamingWanPipeline": "streaming",
    "WanAccelImageToVideoPipeline": "wan",
    "WanAccelPipeline": "wan",
    "WanAccelVACEPipeline": "wan",
}

__all__ = [
    "CogVideoXAccelImageToVideoPipeline",
    "CogVideoXAccelPipeline",
    "Flux2AccelKleinPipeline",
    "Flux2AccelPipeline",
    "FluxAccelFillPipeline",
    "FluxAccelKontextPipeline",
    "FluxAccelPipeline",
    "HunyuanVideo15AccelImageToVideoPipeline",
    "HunyuanVideo15AccelPipeline",
    "HunyuanVideoAccelImageToVideoPipeline",
    "HunyuanVideoAccelPipeline",
    "StreamingWanPipeline",
    "WanAccelImageToVideoPipeline",
    "WanAccelPipeline",
    "WanAccelVACEPipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _WRAPPERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WRAPPERS[name]}"), name)
