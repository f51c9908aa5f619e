"""Clips on their way to the judge: one file each, so that a killed run makes none again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dit_accel.errors import ConfigError
from dit_accel.models import check_model

_LABEL = "made_by.json"


class ClipFolder:
    """Clips of one model, made in one way.

    Args:
        folder: where they lie; made where it is missing.
        made_by: which model, and how.

    Raises:
        ConfigError: the clips in the folder were made by something else.
    """

    def __init__(self, folder: Path, made_by: Mapping[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        label, wanted = folder / _LABEL, json.loads(json.dumps(made_by))
        found = json.loads(label.read_text()) if label.exists() else wanted
        if found != wanted:
            other = ", ".join(sorted(key for key in wanted | found if wanted.get(key) != found.get(key)))
            raise ConfigError("clips", f"{folder} holds clips of another {other}; name another folder, or delete it")
        _write(label, json.dumps(wanted, indent=1).encode())

    def path(self, number: int) -> Path:
        """Of a clip."""
        return self.folder / f"{number:04d}.npz"

    def has(self, number: int) -> bool:
        """Whether a clip is there."""
        return self.path(number).exists()

    def keep(self, number: int, clip: np.ndarray) -> None:
        """Write a clip, uint8 `[T, H, W, 3]`, under a temporary name that is renamed when complete."""
        partial = self.path(number).with_suffix(f".{os.getpid()}.npz")
        np.savez_compressed(partial, clip=clip)
        partial.replace(self.path(number))

    def read(self, number: int) -> np.ndarray:
        """A clip, uint8 `[T, H, W, 3]`."""
        with np.load(self.path(number), allow_pickle=False) as kept:
            return np.asarray(kept["clip"])


def _write(path: Path, content: bytes) -> None:
    partial = path.with_suffix(f".{os.getpid()}")  # of this process: others may write the same
    partial.write_bytes(content)
    partial.replace(path)


def weights_digest(repository: str) -> str:
    """SHA-256 of all weights of a pipeline, in hexadecimal."""
    weights = hashlib.sha256()
    for path in sorted(Path(check_model(repository)).rglob("*.safetensors")):
        weights.update(path.read_bytes())
    return weights.hexdigest()
