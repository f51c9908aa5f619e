"""A tiny pipeline's transformer with the arguments that the pipeline calls it with."""

from __future__ import annotations

import copy
from functools import cache

import torch

from dit_accel.families.base import bind_forward
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline

# One name per class of transformer, and the further layouts that change what a processor sees.
ONE_PER_TRANSFORMER = [
    "wan2.1-t2v", "wan2.1-vace", "hunyuan-video", "hunyuan-video-1.5", "flux1-dev", "flux2-dev", "cogvideox-5b",
]  # fmt: skip


@cache
def _capture(name):
    pipe, seen = tiny_pipeline(name), []

    def keep(module, args, kwargs):
        seen.append({k: v for k, v in bind_forward(module, args, kwargs).items() if k != "self"})

    hook = pipe.transformer.register_forward_pre_hook(keep, with_kwargs=True)
    pipe(**tiny_arguments(name, steps=1))
    hook.remove()
    return pipe.transformer, {**seen[0], "return_dict": False}


def captured(name):
    """A fresh copy of the transformer of `tiny_pipeline(name)`, and the arguments of its first call."""
    model, values = _capture(name)
    return copy.deepcopy(model), dict(values)


@torch.no_grad()
def run(model, values):
    out = model(**values)[0]
    return torch.stack(out) if isinstance(out, list) else out


def processors(model):
    """Every attention processor by the name of its module."""
    return {name: module.processor for name, module in model.named_modules() if hasattr(module, "processor")}
