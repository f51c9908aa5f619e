"""What `--dry-run` predicts is what a run computes."""

from __future__ import annotations

import pytest
import torch

from dit_accel.engine import Engine
from dit_accel.estimate import estimate, token_layout
from dit_accel.methods.registry import get_method
from dit_accel.presets import MethodSpec, load_preset
from dit_accel.schedule import Schedule
from dit_accel.state import RunState


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("re_ttention", {"density": 0.1}),
        ("re_ttention", {"density": 0.1, "period": 2}),
        ("composed", {"density": 0.25, "remainder": "history", "period": 2, "tile": [1, 4, 4]}),
        ("composed", {"density": 0.25, "remainder": "drop", "tile": [1, 4, 4]}),
        ("aurora", {"density": 0.25, "block": 16, "query_block": 16}),
        ("asa", {"density": 0.25, "remainder": "overlap", "pool": 2, "tile": [1, 4, 4]}),
        ("asa", {"density": 0.25, "tile": [1, 4, 4]}),
        ("clear", {"radius": 3.0, "remainder": "pooled", "pool": 2, "tile": [1, 4, 4]}),
        ("clear", {"radius": 3.0, "tile": [1, 4, 4]}),
        ("psa", {"density": 0.25, "block": 16}),
    ],
)
@pytest.mark.parametrize("text", ["cross", "after"])
def test_the_density_that_is_estimated_is_that_of_a_run(name, parameters, text):
    """With what a method computes beside its blocks: everything now and then, or means of all tokens."""
    preset = load_preset("tiny-wan")
    generation = preset.generation.model_copy(
        update={"height": 64, "width": 64, "num_frames": 9, "num_inference_steps": 10}
    )
    facts = preset.model.model_copy(update={"text": text, "text_tokens": 20})
    spec, steps = MethodSpec(name=name, parameters=parameters), generation.num_inference_steps
    expected = estimate(
        preset.model_copy(update={"model": facts, "generation": generation, "method": spec, "schedule": Schedule()})
    )
    layout, generator, layer = token_layout(facts, generation), torch.Generator().manual_seed(0), torch.nn.Identity()
    engine = Engine(get_method(name, **parameters), Schedule(), [layer], break_even=1.0)
    for step in range(steps):
        q, k, v = torch.randn(3, 1, layout.tokens, 1, 8, generator=generator)
        engine.begin(RunState(layout.grid, step, 0.5))
        engine.attend(layer, q, k, v, dense=lambda q=q: q, text=layout.text_position)
    mean = sum(float(call.density) for call in engine.calls) / steps
    assert (len(engine.calls), expected.dense_share) == (steps, pytest.approx(0))
    assert expected.density == pytest.approx(mean, rel=0.1)
