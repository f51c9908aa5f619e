"""The report: what is in the JSON, and the page made of it."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import dit_accel
from dit_accel.cli import main
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.report.charts import color, heat_map
from dit_accel.report.page import find_video, read_run, render_page
from dit_accel.report.plan_picture import coarse_shares, picture
from dit_accel.report.records import PHASES, CallRecord, Report
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.video.files import OutputFile


@pytest.fixture(scope="module")
def run():
    """A run of the random pipeline: a dense step, a dense layer, and checked sparse calls."""
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    options = {"density": 0.5, "tile": [2, 2, 4], "dense_steps": 1, "dense_layers": [[1, 2]], "max_error": 9.0}
    with dit_accel.accelerate(pipe, method="composed", break_even=1.0, **options) as acceleration:
        pipe(prompt="x", height=112, width=112, num_frames=17, num_inference_steps=3, output_type="latent")
        return acceleration.report()


def test_every_call_says_what_was_computed(run):
    calls = run.to_dict()["calls"]
    assert len(calls) == 2 * 3 * 2
    for call in calls:
        sparse = call["step"] > 0 and call["layer"] == 0
        assert (call["reason"] is None) == sparse
        assert call["attend_ms"] > 0
        assert (call["select_ms"] > 0) == sparse
        # Of so short a sequence only some steps are checked.
        checked = sparse and call["step"] == 1
        assert (call["guard_ms"] > 0) == checked
        assert ("error" in call) == checked
        assert call["requested_density"] == 0.5
        assert 0.5 <= call["density"] < 0.7 if sparse else call["density"] == 1.0
    assert set(run.seconds) == set(PHASES)


def test_the_report_holds_versions_hardware_and_peak_memory(run):
    values = run.to_dict()
    assert values["environment"]["torch"] == torch.__version__
    assert values["environment"]["device"]
    assert values["peak_memory_mib"]["process"] > 50
    assert values["settings"]["schedule"]["max_error"] == 9.0


def test_there_is_one_picture_per_sparse_layer(run):
    (shot,) = run.to_dict()["pictures"]
    assert (shot["layer"], shot["step"]) == (0, 1)
    rows, columns = shot["shape"]
    shares = np.frombuffer(base64.b64decode(shot["shares"]), dtype=np.uint8)
    assert shares.size == rows * columns
    density = next(c["density"] for c in run.to_dict()["calls"] if c["reason"] is None)
    assert np.mean(shot["density_per_head"]) == pytest.approx(density, abs=0.01)


@pytest.mark.parametrize("tokens", [31, 32, 97, 480])
def test_the_coarse_picture_is_the_mean_of_the_mask(tokens):
    blocks = Blocking.uniform(tokens, 8)
    mask = torch.rand(1, 3, blocks.count, blocks.count, generator=torch.Generator().manual_seed(tokens)) < 0.4
    mask[..., 0] = True
    plan = BlockPlan.from_mask(mask, blocks, blocks)
    # Entries that do not count may hold anything.
    plan.indices.masked_fill_(~plan.valid, 2**30)
    side = min(12, blocks.count)
    cell = torch.arange(blocks.count) * side // blocks.count
    expected = torch.zeros(side, side)
    for row in range(side):
        for column in range(side):
            expected[row, column] = mask[0][:, cell == row][..., cell == column].float().mean()
    torch.testing.assert_close(coarse_shares(plan, 12), expected)
    record = CallRecord("transformer", 0, 0, "cond", 0, "composed", 0.4)
    assert picture(plan, record, "composed").density_per_head.shape == (3,)


class Tags(HTMLParser):
    """Collects tags and checks that they are balanced."""

    void = ("meta", "br", "img", "rect", "image")

    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag):
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    tags = Tags()
    tags.feed(page)
    assert tags.open == []
    return tags


def test_the_page_is_self_contained_and_shows_every_cell(run, tmp_path):
    video = tmp_path / "run.mp4"
    with OutputFile(video) as file:
        file.write(np.zeros((3, 16, 16, 3), dtype=np.uint8), 5)
    run.to_json(tmp_path / "run.json")
    values = read_run(tmp_path / "run.json")
    page = render_page(values | {"prompt": "<b>&\"'"}, find_video(tmp_path / "run.json"))
    tags = parse(page)
    assert "<script" not in page
    assert all(link.startswith("data:") for link in tags.links)
    assert any(link.startswith("data:video/mp4") for link in tags.links)
    text = " ".join(tags.text)
    assert "<b>&\"'" in text
    for chart in ("density, realised", "density, requested", "time", "estimated relative error"):
        assert chart in tags.text
    for layer in range(2):
        for step in range(3):
            assert f"layer {layer}, step {step}:" in text
    assert "dense: step 0 is in dense_steps [0, 1)" in text
    assert "method: composed" in text
    assert run.to_dict()["environment"]["torch"] in text


def test_a_large_video_is_named_and_not_embedded(run, tmp_path, monkeypatch):
    from dit_accel.report import page as report_page

    monkeypatch.setattr(report_page, "LARGEST_VIDEO", 10)
    video = tmp_path / "clip.gif"
    video.write_bytes(b"x" * 11)
    page = render_page(run.to_dict(), video)
    assert "clip.gif" in page
    assert "data:image/gif" not in page


def test_an_empty_run_makes_a_page():
    page = render_page(Report([], {"method": "dense", "parameters": {}}).to_dict())
    assert "0, of which 0 sparse" in page
    parse(page)


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (
            {
                "stream": {"chunk": 2}, "prompts": [{"prompt": "a"}, {"prompt": "b"}],
                "denoise_s": [1.5], "decode_s": [0.5], "denoise_fps": 2.0, "cache_bytes": 2**20,
            },
            ("a | b", "1.50 s denoising", "0.50 s decoding", "1.0 MiB", "chunk: 2"),
        ),
        ({"layout": {"clips": 2}, "prompts": ["a", "b"], "times": {"total": 1.0}}, ("a | b",)),
    ],
)  # fmt: skip
def test_a_stream_and_a_video_of_several_prompts_make_a_page(values, shown, tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(values | {"preset": {"name": "mine"}, "seed": 3}))
    text = " ".join(parse(render_page(read_run(tmp_path / "run.json"))).text)
    for words in (*shown, "name: mine"):
        assert words in text
    assert "attention calls" not in text


def test_a_heat_map_places_values_on_the_ramp():
    chart = heat_map("t", "u", {(3, 5): (0.0, ""), (3, 9): (1.0, "why"), (7, 5): (0.5, "")})
    fills = re.findall(r'fill="(#\w+)"><title>', chart)
    assert fills == [color(0), color(1), color(0.5)]
    assert "layer 3, step 9: 1 u\nwhy" in chart
    assert color(0) != color(0.5) != color(1)
    assert color(-1) == color(0)
    assert color(2) == color(1)


def test_requested_density_is_none_where_the_rule_decides():
    record = CallRecord("transformer", 0, 0, "cond", 0, "radial", None)
    assert "density, requested" not in render_page(Report([record], {"method": "radial"}).to_dict())


def call(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["dit-accel", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.main()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


def test_the_command_writes_the_page(run, tmp_path, monkeypatch, capsys):
    run.to_json(tmp_path / "run.json")
    code, out, err = call(monkeypatch, capsys, "report", tmp_path / "run.json", "--html", tmp_path / "out.html")
    assert code == 0, err
    assert "out.html" in out
    parse((tmp_path / "out.html").read_text())
    assert call(monkeypatch, capsys, "report", tmp_path / "run.json")[0] == 0
    assert (tmp_path / "run.html").is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), ("{", "expected JSON"), ("[]", "under `calls`"), ('{"calls": [{}]}', "under `calls`")],
)
def test_a_file_that_is_no_report_gets_one_line(content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)
    code, _, err = call(monkeypatch, capsys, "report", path)
    assert code == 2
    assert message in err
    assert not path.with_suffix(".html").exists()


def test_doctor_tests_backends_and_chooses_for_every_preset(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "doctor", "--family", "wan")
    assert code == 0
    assert re.search(r"backend torch: usable; 4 self-tests passed, 0 failed", out)
    assert "no fault found" in out
    assert "tiny-wan" in out


def test_doctor_leaves_with_1_when_a_backend_is_wrong(monkeypatch, capsys):
    from dit_accel import doctor
    from dit_accel.doctor import BackendFinding, known_to_break

    wrong = BackendFinding("torch", "usable; 0 self-tests passed, 1 failed", ("is off by 1",))
    monkeypatch.setattr(doctor, "backend_findings", lambda test: iter([wrong]))
    code, out, _ = call(monkeypatch, capsys, "doctor", "--family", "wan")
    assert code == 1
    assert "backend torch is off by 1" in out
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "0.1" if package == "diffusers" else "99")
    assert [told.split()[0] for told in known_to_break()] == ["diffusers"]


def test_doctor_says_what_to_install_and_that_triton_is_not_torchs(monkeypatch):
    from dit_accel import doctor

    monkeypatch.setattr(
        doctor.util, "find_spec", lambda module: None if module in ("gradio", "torchvision") else module
    )
    assert list(doctor.installs()) == [
        "pip install torchvision gives LPIPS in `dit-accel compare`",
        "pip install 'dit_accel[demo]' gives `dit-accel demo`",
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda package: ["triton==9.1; python_version > '3'", "jinja2"])
    assert any("install triton==9.1" in told for told in doctor.known_to_break())
    assert "GiB free on cpu" in doctor.memory()
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "2.9.1" if package == "torch" else "99")
    for cuda, count in ((None, 0), ("12.8", 1)):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        assert sum("174051" in told for told in doctor.known_to_break()) == count


def test_doctor_reports_a_self_test_that_fails(monkeypatch):
    from dit_accel import doctor

    monkeypatch.setattr(doctor, "fault_of", lambda backend, request: "its self-test output is off by 3")
    findings = {finding.name: finding for finding in doctor.backend_findings()}
    assert len(findings["torch"].faults) == 4
    assert "float32 and head_dim 64" in findings["torch"].faults[0]
