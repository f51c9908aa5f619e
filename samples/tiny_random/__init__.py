"""Tiny pipelines with random weights, one per model: for tests and smoke tests, not for looking at.

Tokenizers, text encoders, autoencoders and transformers are made in code, at the structure of the published model and
a tiny size; nothing is downloaded. ::

    from dit_accel.samples.tiny_random import tiny_arguments, tiny_names, tiny_pipeline

    pipe = tiny_pipeline("wan2.1-i2v")              # a plain diffusers.WanImageToVideoPipeline, on the CPU, in fp32
    with dit_accel.accelerate(pipe, method="radial"):
        pipe(**tiny_arguments("wan2.1-i2v"))        # prompt, image, size, two steps: about a second

`tiny_arguments` returns everything that the call needs at this size, so a preset's height, width, num_frames and
num_inference_steps must give way to it. `TINY[name]` says family, task and pipeline class of a name.
"""

from __future__ import annotations

from dit_accel.samples.tiny_random.registry import TINY, TinyModel, tiny_arguments, tiny_names, tiny_pipeline
from dit_accel.samples.tiny_random.wan import RANDOM_SIZES, random_wan_pipeline

__all__ = ["RANDOM_SIZES", "TINY", "TinyModel", "random_wan_pipeline", "tiny_arguments", "tiny_names", "tiny_pipeline"]
