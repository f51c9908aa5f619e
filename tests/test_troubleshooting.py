"""Every message that docs/troubleshooting.md quotes is one that the library prints."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.cli import generate, main
from dit_accel.cli.parallel import Degrees, Processes
from dit_accel.errors import DitAccelError
from dit_accel.kernels import block_attention
from dit_accel.kernels.registry import Backend, Request
from dit_accel.kernels.selftest import fault_of
from dit_accel.models import resolve_device
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.presets import load_preset
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline
from dit_accel.schedule import Schedule
from dit_accel.video.files import OutputFile

PAGE = (Path(__file__).parents[1] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
NO_MESSAGE = ("torch.compile",)
FIRST_CELLS = [line.split(" | ")[0] for line in PAGE.splitlines() if line.startswith("| ")]
QUOTED = [text for cell in FIRST_CELLS for text in re.findall(r"`([^`]+)`", cell) if text not in NO_MESSAGE]


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("wan2.1-t2v")


def error(action):
    with pytest.raises((DitAccelError, RuntimeError)) as caught:
        action()
    return str(caught.value)


def schedule(**values):
    return Schedule.make(**values).dense_reason(0, 0, 0.5, 100)


def reasons(pipe, **settings):
    with dit_accel.accelerate(pipe, **settings) as acceleration:
        pipe(**tiny_arguments("wan2.1-t2v"))
        return "; ".join(acceleration.report().to_dict()["dense_reasons"])


def foreign_processor(pipe):
    module = pipe.transformer.blocks[0].attn1
    stock = module.processor
    module.set_processor(lambda *args, **kwargs: None)
    try:
        return error(lambda: dit_accel.accelerate(pipe, method="radial"))
    finally:
        module.set_processor(stock)


def processor_made_anew(pipe):
    with dit_accel.accelerate(pipe, method="radial"):
        return error(type(pipe.transformer.blocks[0].attn1.processor))


def triton_without_gpu():
    q, blocks = torch.randn(1, 1, 4, 8), Blocking.uniform(4, 2)
    plan = BlockPlan.from_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), blocks, blocks)
    return error(lambda: block_attention(q, q, q, plan, backend="triton"))


def wrong_kernel():
    def run(q, k, v, plan, **options):
        return torch.ones_like(q), q.new_zeros(q.shape[:3])

    return fault_of(Backend("wrong", run, lambda _: None, 1, 1.0), Request(torch.device("cpu"), torch.float32, 8))


def unexplained_length(pipe):
    with dit_accel.accelerate(pipe, method="radial") as acceleration:
        pipe(**tiny_arguments("wan2.1-t2v"))
        q = torch.randn(1, 99, 2, 8)
        acceleration.engines["transformer"].attend(pipe.transformer.blocks[0].attn1, q, q, q, dense=lambda: q)
        return "; ".join(acceleration.report().to_dict()["dense_reasons"])


def ring():
    return error(lambda: Degrees(ring=2).check_preset(load_preset("wan2.1-t2v-14b-720p"), 40))


def wrong_cache(pipe):
    preset = load_preset("wan2.1-t2v-1.3b-480p")
    extras = preset.extras.model_validate({"cache": {"name": "pab", "parameters": {}}})
    return error(lambda: dit_accel.accelerate(pipe, preset.model_copy(update={"extras": extras})))


def command(entry, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit):
        entry()
    return " ".join(capsys.readouterr().err.split())


def missing_extra(monkeypatch, capsys):
    # Imported anew, the package would also stand in its parent for the tests that follow.
    monkeypatch.setattr("dit_accel.pipelines.demo", importlib.import_module("dit_accel.pipelines.demo"))
    for name in [name for name in sys.modules if name.startswith(("gradio", "dit_accel.pipelines.demo"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "gradio", None)
    return command(main.main, monkeypatch, capsys, "demo")


def broken_frames(monkeypatch, capsys, tmp_path):
    frames = np.full((1, 32, 32, 3), np.nan)
    monkeypatch.setattr("dit_accel.generation.call_pipeline", lambda *_, **__: (frames, {"denoise": 0.0, "total": 0.0}))
    target = tmp_path / "o.mp4"
    told = command(generate.main, monkeypatch, capsys, "--prompt", "x", "--output", str(target))
    assert not target.exists()
    return told


def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return error(lambda: resolve_device("cuda", "auto"))


def no_device(monkeypatch):
    def empty(*_, **__):
        raise RuntimeError("PyTorch is not linked with support for mps devices")

    monkeypatch.setattr(torch, "empty", empty)
    return error(lambda: resolve_device("mps", "auto"))


def bad_path(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.mp4").mkdir()
    paths = (tmp_path / "file" / "o.mp4", tmp_path / "folder.mp4")
    return " ".join(error(functools.partial(OutputFile, path)) for path in paths)


PRINTED = {
    "frames hold NaN or infinite numbers": broken_frames,
    "its self-test output is off by": wrong_kernel,
    "step 0 is in dense_steps [0, 4)": lambda: schedule(dense_steps=4),
    "tokens are fewer than min_tokens": lambda: schedule(min_tokens=101),
    "is above the break-even": lambda pipe: reasons(pipe, method="radial", break_even=0.0),
    "method is dense": lambda pipe: reasons(pipe, method="dense"),
    "is in dense_layers": lambda: schedule(dense_layers=1),
    "is in dense_noise": lambda: schedule(dense_noise=[[0.4, 0.6]]),
    "remove the other processor first": foreign_processor,
    "cannot be made anew: call remove() before": processor_made_anew,
    "backend 'triton' cannot run this call": triton_without_gpu,
    "the call has 99 tokens where the geometry says 27": unexplained_length,
    "torchrun started 2 processes": lambda: error(lambda: Degrees().check(Processes(count=2))),
    "under ring attention each process holds a share": ring,
    "extras.cache: pab cannot run on WanPipeline": wrong_cache,
    "unknown key": lambda: error(lambda: Schedule.make(dense_step=4)),
    "cannot write in": bad_path,
    "is a directory": bad_path,
    "install it with: pip install 'dit_accel[demo]'": missing_extra,
    "cuda was asked for, but torch finds no CUDA device here": no_cuda,
    "cannot be used here": no_device,
}


def test_the_page_quotes_what_is_tested_here():
    assert sorted(QUOTED) == sorted(PRINTED)


@pytest.mark.parametrize("quoted", sorted(PRINTED))
def test_every_quoted_message_is_printed(quoted, request):
    make = PRINTED[quoted]
    told = make(**{name: request.getfixturevalue(name) for name in inspect.signature(make).parameters})
    assert re.sub(r"\d+", "N", quoted) in re.sub(r"\d+", "N", told), told


def test_every_fault_has_a_cause_and_something_to_do():
    rows = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| ")]
    assert {len(row) for row in rows} == {3}
    assert all(cell.strip() for row in rows for cell in row)
