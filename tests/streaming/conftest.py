"""Fixtures of streams."""

from __future__ import annotations

import pytest
from stream_cases import tiny_transformer

from dit_accel.pipelines.streaming.positions import Rotary


@pytest.fixture(scope="session")
def rotary():
    return Rotary(tiny_transformer(layers=1).rope)
