"""To which accelerator offloaded weights come, by every way to ask for one."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from extras_cases import WAN, with_extras
from preset_cases import pipeline_of

from dit_accel.acceleration import accelerate
from dit_accel.cli import generate
from dit_accel.cli import main as others
from dit_accel.errors import UnsupportedError
from dit_accel.extras.install import offload_device, store_weights
from dit_accel.extras.settings import Extras, Offload
from dit_accel.models import load_for_preset
from dit_accel.pipelines.cogvideox import CogVideoXAccelPipeline
from dit_accel.pipelines.demo.jobs import Studio
from dit_accel.presets import load_preset
from dit_accel.samples.tiny_random import tiny_pipeline


def has_accelerator(monkeypatch, name):
    monkeypatch.setattr("dit_accel.extras.install._accelerator", lambda: torch.device(name))


def test_streams_are_refused_on_an_accelerator_without_them(monkeypatch):
    has_accelerator(monkeypatch, "mps:0")
    preset = with_extras(WAN, offload={"mode": "group", "stream": True})
    with pytest.raises(UnsupportedError, match=r"extras\.offload: stream is for CUDA and XPU devices.*mps"):
        accelerate(pipeline_of(preset.tiny), preset)


@pytest.mark.parametrize(
    ("asked", "expected"), [(None, 2), ("auto", 2), ("cuda", 2), ("cuda:1", 1), (torch.device("cuda", 0), 0)]
)
@pytest.mark.parametrize("mode", ["model", "sequential", "group"])
def test_weights_come_to_the_accelerator_that_was_asked_for(monkeypatch, mode, asked, expected):
    has_accelerator(monkeypatch, "cuda:2")
    pipe, called = tiny_pipeline(load_preset(WAN).tiny), []
    for name in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        monkeypatch.setattr(pipe, name, lambda device: called.append(device))
    monkeypatch.setattr(pipe, "enable_group_offload", lambda onload_device, **_: called.append(onload_device))
    accelerate(pipe, with_extras(WAN, offload={"mode": mode}), offload_to=asked).remove()
    store_weights(Extras(offload={"mode": mode}), pipe, asked)
    assert called == [torch.device("cuda", expected)] * 2


def test_weights_stay_with_the_accelerator_that_they_lie_on(monkeypatch):
    has_accelerator(monkeypatch, "cuda:2")

    class Away(torch.nn.Module):
        def parameters(self, recurse=True):
            return iter([SimpleNamespace(device=torch.device("meta")), SimpleNamespace(device=torch.device("cuda", 5))])

    spec = Offload(mode="model")
    assert offload_device(spec, None, {"transformer": Away()}) == torch.device("cuda", 5)
    assert offload_device(spec, "cuda:1", {"transformer": Away()}) == torch.device("cuda", 1)


def test_the_current_accelerator_is_told_by_its_number(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 3)
    assert offload_device(Offload(mode="model")) == torch.device("cuda", 3)


def test_offload_on_the_cpu_is_refused_before_a_model_is_loaded(monkeypatch):
    has_accelerator(monkeypatch, "cuda:0")
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UnsupportedError, match=r"extras\.offload.*the device asked for is cpu; ask for cuda:0"):
        load_for_preset(with_extras(WAN, offload={"mode": "model"}), None, "cpu")
    with pytest.raises(UnsupportedError, match="the device asked for is cpu"):
        store_weights(Extras(offload={"mode": "group"}), tiny_pipeline(load_preset(WAN).tiny), "cpu")


class Asked(Exception):
    """Says which accelerator offload was asked for."""


@pytest.fixture
def mine(monkeypatch, tmp_path):
    """A preset with offload, and commands that stop where they would switch it on."""

    def stop(spec, pipe, models, device):
        raise Asked(device)

    def load(preset, *_):
        return tiny_pipeline(preset.tiny)

    monkeypatch.setattr("dit_accel.extras.install._offload", stop)
    has_accelerator(monkeypatch, "cuda:0")
    for module in ("models", "pipelines.base", "pipelines.demo.jobs"):
        monkeypatch.setattr(f"dit_accel.{module}.load_for_preset", load)
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("extends: cogvideox-2b\nextras: {offload: {mode: model}}\n")
    return str(path)


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (generate.main, "--prompt x --preset {}"),
        (generate.main, "--prompt x --prompt y --preset {}"),
        (others.main, "compare --prompts x --preset {}"),
        (others.main, "calibrate --prompts x --density 0.5 --preset {} --output o.yaml"),
    ],
)
def test_every_command_says_where_offloaded_weights_go(monkeypatch, mine, main, words):
    monkeypatch.setattr(sys, "argv", ["dit-accel", *words.format(mine).split(), "--device", "cuda:1"])
    with pytest.raises(Asked, match="cuda:1"):
        main()


def test_wrappers_and_the_page_say_where_offloaded_weights_go(mine, tmp_path):
    with pytest.raises(Asked, match="cuda:1"):
        CogVideoXAccelPipeline.from_preset(mine, device="cuda:1")
    with pytest.raises(Asked, match="cuda:1"):
        Studio(mine, tmp_path, "cuda:1").load()


def test_a_bare_transformer_is_offloaded_by_groups_alone(monkeypatch):
    has_accelerator(monkeypatch, "cuda:0")
    with pytest.raises(UnsupportedError, match="needs a pipeline"):
        accelerate(pipeline_of(load_preset(WAN).tiny).transformer, with_extras(WAN, offload={"mode": "model"}))
