"""Quantised weights under sparse attention, and what is refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from extras_cases import WAN, with_extras
from preset_cases import pipeline_of

from dit_accel.acceleration import accelerate
from dit_accel.calibrate.weights import fingerprint
from dit_accel.cli import main
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.extras import settings as extras_module
from dit_accel.extras.settings import Extras, Quantization, quantization_config
from dit_accel.models import load_for_preset
from dit_accel.presets import load_preset


def test_quantisation_is_refused_where_it_cannot_be_made(monkeypatch):
    preset = with_extras(WAN, quantization={"backend": "torchao"})
    with pytest.raises(UnsupportedError, match=r"extras\.quantization: transformer is loaded already"):
        accelerate(pipeline_of(preset.tiny), preset)
    with pytest.raises(ConfigError, match="the tiny model is not loaded"):
        load_for_preset(preset, "tiny")
    monkeypatch.setattr(extras_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="torchao needs torchao: pip install torchao"):
        load_for_preset(preset, "samples/tiny-wan")
    with pytest.raises(ConfigError, match="bitsandbytes_4bit needs bitsandbytes"):
        quantization_config(Quantization(backend="bitsandbytes_4bit"))


def test_weights_of_torchao_run_under_sparse_attention():
    pytest.importorskip("torchao", reason="torchao is not installed")
    shipped = load_preset("tiny-wan/radial")
    preset = shipped.model_copy(update={"extras": Extras(quantization={"backend": "torchao"})})
    pipe = load_for_preset(preset, None, "cpu", "float32")
    assert type(pipe.transformer.blocks[0].attn1.to_q.weight).__name__ == "Int8Tensor"
    assert fingerprint(pipe) != fingerprint(load_for_preset(shipped, None, "cpu", "float32"))
    size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
    with accelerate(pipe, preset, break_even=1.0, dense_steps=0, dense_layers=0) as acceleration:
        frames = torch.as_tensor(pipe(prompt="a red ball", **size, output_type="np").frames)
        assert {call.reason for call in acceleration.report().calls} == {None}
    assert torch.isfinite(frames).all()


@pytest.mark.parametrize("command", [["compare", "radial"], ["calibrate", "--density", "0.5"]])
@pytest.mark.parametrize(
    ("extras", "message"),
    [("quantization: {backend: torchao}", "torchao needs torchao"), ("offload: {mode: model}", "extras.offload")],
)
def test_commands_load_what_the_extras_of_their_preset_say(command, extras, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(extras_module.importlib.util, "find_spec", lambda name: None if name == "torchao" else object())
    monkeypatch.setattr("dit_accel.cli.compare._write_video", lambda *_: pytest.fail("a video was made"))
    monkeypatch.setattr("dit_accel.calibrate.run.call_pipeline", lambda *_: pytest.fail("a prompt was run"))
    path = tmp_path / "mine.yaml"
    path.write_text(f"extends: tiny-wan\nextras: {{{extras}}}\n")
    output = tmp_path / ("out" if command[0] == "compare" else "out.yaml")
    given = ["--preset", path, "--num-inference-steps", 1, "--device", "cpu", "--output", output]
    monkeypatch.setattr(sys, "argv", ["dit-accel", *command, *map(str, given)])
    with pytest.raises(SystemExit):
        main.main()
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("backend", ["bitsandbytes_4bit", "bitsandbytes_8bit"])
def test_bitsandbytes_is_refused_without_an_accelerator(backend, monkeypatch):
    monkeypatch.setattr(extras_module.importlib.util, "find_spec", lambda name: object())
    for device in (torch.cuda, torch.xpu, torch.mps):
        monkeypatch.setattr(device, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match=f"{backend} on an accelerator only"):
        load_for_preset(with_extras(WAN, quantization={"backend": backend}), "samples/tiny-wan")


def test_torchao_types_are_found_by_name_only(monkeypatch):
    package, module = ModuleType("torchao"), ModuleType("torchao.quantization")
    module.Int8WeightOnlyConfig = type("Int8WeightOnlyConfig", (), {})
    module.quantize_ = lambda: None
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", module)
    assert isinstance(extras_module._torchao_type("Int8WeightOnlyConfig"), module.Int8WeightOnlyConfig)
    for wrong in ("quantize_", "NoSuchConfig", 3):
        with pytest.raises(ConfigError, match="expected the name of a config class"):
            extras_module._torchao_type(wrong)
