"""Every remainder with every selection, spelled in Python, in YAML and on the command line: always the same method."""

from __future__ import annotations

import itertools

import pytest
import torch
import yaml
from method_cases import attend, tensors

from dit_accel.compare.candidates import parse_candidate
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.presets import load_preset

SELECTIONS = (
    {"score": "pooled"},
    {"score": "covariance", "heads": "adaptive"},
    {"score": "error", "scope": "layer"},
    {"score": "antidiagonal", "stride": 4, "density": None, "mass": 0.5},
    {"score": "subblock", "stride": 4, "density": None, "tau": 0.3},
)
REMAINDERS = (
    {"remainder": "drop"},
    {"remainder": "pooled"},
    {"remainder": "pooled", "second_order": True},
    {"remainder": "taylor", "first_order": "block"},
    {"remainder": "taylor", "first_order": "grouped", "group": 4},
    {"remainder": "taylor", "first_order": "global"},
    {"remainder": "taylor", "first_order": "mixed", "about": "query"},
    {"remainder": "rectified"},
    {"remainder": "history"},
)


@pytest.mark.parametrize(("select", "rest"), itertools.product(SELECTIONS, REMAINDERS), ids=str)
def test_every_remainder_goes_with_every_selection(select, rest, tmp_path):
    parameters = {"order": "bisect", "tile": [1, 4, 4], "block": 16, "density": 0.3, **select, **rest}
    method = get_method("composed", **parameters)
    layout = TokenLayout((2, 5, 9))
    q, k, v = (x.double() for x in tensors(layout))
    fast, exact = (attend(method, layout, q, k, v, backend) for backend in ("torch", "reference"))
    torch.testing.assert_close(fast, exact, atol=1e-9, rtol=1e-8)
    file = tmp_path / "mine.yaml"
    mine = {"extends": "tiny-wan/dense", "method": {"name": "composed", "parameters": parameters}}
    file.write_text(yaml.safe_dump(mine))
    asked = load_preset(str(file)).method
    assert get_method(asked.name, **asked.parameters) == method
    typed = ",".join(f"{key}={value}" for key, value in parameters.items() if value is not None)
    if parameters["density"] is not None:
        assert parse_candidate(f"composed:{typed}", load_preset("tiny-wan")).method == method
