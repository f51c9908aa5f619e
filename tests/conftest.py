"""Shared fixtures: a random pipeline folder, made once per session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from dit_accel.samples.tiny_random import random_wan_pipeline

# Workers of a parallel run share the cores: one thread each.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "random-wan"
    random_wan_pipeline().save_pretrained(folder)
    return folder
