"""docs/models.md says what the data of the tests say."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from dit_accel.families.published import published_models
from dit_accel.samples.tiny_random import TINY

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
MODELS = published_models()
ROWS = {
    line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in PAGE.splitlines() if "|" in line
}


@pytest.mark.parametrize("model", MODELS, ids=[model.name for model in MODELS])
def test_every_published_model_has_its_row(model):
    repository, run, layers, size, tokens = ROWS[model.name]
    assert model.repository in repository
    assert all(name in TINY for name in re.findall(r"`([^`]+)`", run))
    assert layers.removeprefix("2 × ") == " + ".join(str(n) for n in model.layers.values())
    height, width, _, grid = model.sizes[-1]
    assert size.startswith(f"{width}×{height}")
    text = f" + {model.text:,}" if model.text else ""
    assert tokens == f"{math.prod(grid):,}{text}"


def test_every_tiny_pipeline_is_named():
    assert [name for name in TINY if f"`{name}`" not in PAGE] == []
