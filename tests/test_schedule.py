"""The schedule: half-open ranges, and refusals with a path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_accel.errors import ConfigError
from dit_accel.schedule import Schedule


def test_an_integer_means_the_first_n():
    assert Schedule.make(dense_steps=3).dense_steps == ((0, 3),)
    assert Schedule.make(dense_steps=0).dense_steps == ()
    assert Schedule.make(dense_layers=[1, 2]).dense_layers == ((1, 2),)


@given(st.integers(0, 60), st.integers(0, 30), st.integers(1, 30))
def test_ranges_are_half_open(step, start, length):
    schedule = Schedule.make(dense_steps=[[start, start + length]])
    assert (schedule.dense_reason(0, step, 0.5, 100) is not None) == (start <= step < start + length)


@given(st.floats(0, 1), st.floats(0, 0.99), st.floats(0.01, 1))
def test_noise_windows_are_half_open_and_include_pure_noise(noise, low, width):
    high = min(1.0, low + width)
    if low >= high:
        return
    schedule = Schedule.make(dense_noise=[[low, high]])
    inside = low <= noise < high or (noise == 1 and high == 1)
    assert (schedule.dense_reason(0, 0, noise, 100) is not None) == inside


@pytest.mark.parametrize(
    ("values", "path", "message"),
    [
        ({"dense_steps": True}, "schedule.dense_steps", "tuple"),
        ({"dense_steps": [[0, True]]}, "schedule.dense_steps.0.1", "integer"),
        ({"dense_steps": [[0, 2.5]]}, "schedule.dense_steps.0.1", "integer"),
        ({"dense_steps": [[4, 2]]}, "schedule", "low < high"),
        ({"dense_steps": [[-1, 2]]}, "schedule.dense_steps.0.0", "greater than or equal to 0"),
        ({"dense_noise": [[0.5, float("nan")]]}, "schedule.dense_noise.0.1", "finite"),
        ({"dense_noise": [[0.5, 1.5]]}, "schedule.dense_noise.0.1", "less than or equal to 1"),
        ({"dense_layers": [[0, 3], [2, 4]]}, "schedule", "overlaps"),
        ({"refresh": 0}, "schedule.refresh", "greater than or equal to 1"),
        ({"min_tokens": True}, "schedule.min_tokens", "integer"),
        ({"dense_step": 3}, "schedule.dense_step", "did you mean 'dense_steps'"),
    ],
)
def test_faults_name_the_place(values, path, message):
    with pytest.raises(ConfigError) as caught:
        Schedule.make(**values)
    assert caught.value.path == path
    assert message in str(caught.value)


def test_overrides_replace_parameters_of_their_layers_only():
    schedule = Schedule.make(overrides=[{"layers": [[2, 4]], "parameters": {"density": 0.5}}])
    assert [schedule.parameters_for(layer) for layer in range(5)] == [{}, {}, {"density": 0.5}, {"density": 0.5}, {}]
