"""Every preset runs on the tiny pipeline of its model: each method, parameters and schedule once per structure."""

from __future__ import annotations

import numpy as np
import pytest
from preset_cases import arguments, pipeline_of, shrunk

import dit_accel
from dit_accel.presets import list_presets, load_preset


def distinct_presets():
    """One preset for each (tiny model, method, parameters, schedules, extras), grouped by tiny model."""
    found = {}
    for name in list_presets():
        preset = shrunk(load_preset(name))
        key = (preset.tiny, str(preset.method), str(preset.schedule), str(preset.schedule_2), str(preset.extras))
        found.setdefault(key, (preset.tiny, name))
    return [name for _, name in sorted(found.values())]


@pytest.mark.parametrize("name", distinct_presets())
def test_every_preset_runs(name):
    preset = shrunk(load_preset(name))
    pipe = pipeline_of(preset.tiny)
    with dit_accel.accelerate(pipe, preset, break_even=1.0) as acceleration:
        out = np.asarray(pipe(**arguments(pipe, preset))[0])
        calls = acceleration.report().calls
    assert np.isfinite(out).all()
    ran = {call.method for call in calls if call.reason is None}
    assert ran == (set() if preset.method.name == "dense" else {preset.method.name})
