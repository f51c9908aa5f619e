"""What is known of published models without downloading them: class, config, sizes, and where that was read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from dit_accel.errors import ConfigError


@dataclass(frozen=True)
class PublishedModel:
    """One published transformer.

    Args:
        name: short name.
        repository: hub id of the pipeline.
        source: where the config was read.
        class_name: class in Diffusers.
        config: arguments of the class.
        keys: groups of tensor names that its state dict holds.
        layers: attention blocks by the name of their list, in execution order.
        vae: compression of the autoencoder in space and in time.
        text: text tokens beside those of the video, with padding.
        sizes: standard sizes, (height, width, frames, token grid).
        billions: parameters.
    """

    name: str
    repository: str
    source: str
    class_name: str
    config: dict[str, Any]
    keys: list[str]
    layers: dict[str, int]
    vae: tuple[int, int]
    text: int
    sizes: list[tuple[int, int, int, list[int]]]
    billions: float


@cache
def published_models() -> tuple[PublishedModel, ...]:
    """All of them."""
    text = resources.files("dit_accel.families").joinpath("published_models.json").read_text(encoding="utf-8")
    return tuple(PublishedModel(class_name=entry.pop("class"), **entry) for entry in json.loads(text))


def published_model(repository: str) -> PublishedModel:
    """The transformer of a hub repository.

    Raises:
        ConfigError: its config is not known here.
    """
    for model in published_models():
        if model.repository == repository:
            return model
    raise ConfigError("repository", f"the config of {repository!r} is not known without downloading it")
