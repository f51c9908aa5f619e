"""Which weights a measurement belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from dit_accel.siblings import transformers_of

_VALUES = 8


def fingerprint(pipe: Any) -> str:
    """A short name for the weights of a pipeline's transformers: names, shapes and the first values of each parameter.

    Weights trained further, or with other adapters, get another one. It reads a few numbers per parameter, so that it
    costs nothing on large models.
    """
    digest = hashlib.sha256()
    for component, model in transformers_of(pipe).items():
        for name, weight in model.named_parameters():
            digest.update(f"{component}.{name} {tuple(weight.shape)}".encode())
            for part in _parts(weight):
                first = part.detach().reshape(-1)[:_VALUES].to("cpu", torch.float32)
                digest.update(first.numpy().tobytes())
    return digest.hexdigest()[:16]


def _parts(weight: Any) -> list[torch.Tensor]:
    """The plain tensors of a weight: itself, or what a quantised one is made of, which cannot be reshaped whole."""
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [part for name in weight.__tensor_flatten__()[0] for part in _parts(getattr(weight, name))]
