"""A stream's state: what takes it over goes on as it would have, or refuses it untouched."""

from __future__ import annotations

import pytest
import torch
from stream_cases import FRAME, text, tiny_transformer

from dit_accel.errors import ConfigError
from dit_accel.methods.registry import get_method
from dit_accel.pipelines.streaming.attention import DenseContext
from dit_accel.pipelines.streaming.driver import ChunkDriver
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.light_forcing import LightForcing
from dit_accel.pipelines.streaming.memory import CompressedMemory
from dit_accel.pipelines.streaming.planned import PlannedContext
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.pipelines.streaming.states import load_state, save_state
from dit_accel.streaming import StreamSettings

SHORT = {"steps": (1000.0, 500.0), "chunk": 2, "window": 8, "sink": 2}
RADIAL = {"density": 0.5, "block": 2}


@pytest.fixture(scope="module")
def runtime():
    return CausalWan(tiny_transformer())


def driver(runtime, prompt=0, seed=0, policy=DenseContext, size=FRAME, negative=None, **changes):
    settings = StreamSettings(**{**SHORT, **changes})
    return ChunkDriver(runtime, settings, text(prompt), size, seed, negative=negative, policy=policy)


def make(stream, count):
    return torch.cat([stream.next().latents for _ in range(count)], dim=2)


@pytest.mark.parametrize(
    "policy",
    [
        DenseContext,
        lambda: LightForcing(block=2, top_frames=2),
        lambda: FlashBlock({0}, ()),
        lambda: CompressedMemory((1, 2)),
        lambda: PlannedContext(get_method("radial", **RADIAL), min_frames=3),
    ],
    ids=["dense", "light_forcing", "flashblock", "compressed_memory", "radial"],
)
def test_a_stream_that_has_run_goes_on_like_the_one_whose_state_it_takes(runtime, policy, tmp_path):
    stream, used = driver(runtime, policy=policy), driver(runtime, prompt=2, seed=7, policy=policy)
    make(stream, 5)
    make(used, 8)
    save_state(stream.state_dict(), tmp_path / "state.safetensors")
    used.load_state_dict(load_state(tmp_path / "state.safetensors"))
    torch.testing.assert_close(make(used, 4), make(stream, 4), atol=1e-5, rtol=1e-5)  # threads round as memory lies


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sink": 0}, "settings.sink is 2 there and 0 here"),
        ({"window": 6}, "settings.window is 8 there and 6 here"),
        ({"chunk": 3}, "settings.chunk is 2 there and 3 here"),
        ({"steps": (1000.0, 600.0)}, r"settings.steps is \[1000.0, 500.0\] there"),
        ({"positions": "reindex"}, "settings.positions is 'absolute' there and 'reindex' here"),
        ({"guidance_scale": 2.0, "negative": text(5)}, r"policies is \['dense'\] there.*guidance_scale is 1.0 there"),
        ({"attention": {"name": "radial", "parameters": RADIAL}}, "settings.attention.name is 'dense' there"),
        ({"policy": lambda: FlashBlock({0}, ())}, r"policies is \['dense'\] there and \['flashblock'\] here"),
        ({"size": (4, 8)}, r"latents is \[1, 4, 4, 6\] there and \[1, 4, 4, 8\] here"),
    ],
)
def test_the_state_of_another_stream_is_refused_and_changes_nothing(runtime, changes, message):
    stream, other = driver(runtime), driver(runtime, seed=3, **changes)
    undisturbed = make(driver(runtime, seed=3, **changes), 3)
    make(stream, 2)
    first = other.next().latents
    with pytest.raises(ConfigError, match=f"state: is of another stream: .*{message}"):
        other.load_state_dict(stream.state_dict())
    assert torch.equal(torch.cat([first, make(other, 2)], 2), undisturbed)


def test_the_state_of_another_model_is_refused(runtime):
    state = driver(runtime).state_dict()
    with pytest.raises(ConfigError, match=r"model.num_layers is 2 there and 1 here"):
        driver(CausalWan(tiny_transformer(layers=1))).load_state_dict(state)
    with pytest.raises(ConfigError, match=r"model.dtype is 'torch.float32' there and 'torch.bfloat16' here"):
        driver(CausalWan(tiny_transformer().to(torch.bfloat16))).load_state_dict(state)
    with pytest.raises(ConfigError, match="does not say which stream it is of"):
        driver(runtime).load_state_dict({name: x for name, x in state.items() if name != "origin"})
