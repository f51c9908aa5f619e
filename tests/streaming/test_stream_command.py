"""`generate-video --stream`: a file that grows, prompts over time, the report, and what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from stream_cases import SETTINGS, frames_of

from dit_accel.cli import generate
from dit_accel.cli.prompts import LivePrompts, parse_line, read_prompts
from dit_accel.errors import ConfigError
from dit_accel.pipelines.demo.jobs import Studio
from dit_accel.pipelines.streaming import StreamingWanPipeline
from dit_accel.presets import list_presets, load_preset, streaming_preset
from dit_accel.report.page import read_run, render_page
from dit_accel.streaming import BLEND_CHUNKS, stream_preset
from dit_accel.video.growing import StreamingVideoFile


def test_a_stream_becomes_a_video_and_a_report(command, tmp_path):
    code, out, err = command("--prompt", "a red ball", "--num-chunks", "3", "--output", "o.mp4", "--seed", "4")
    assert code == 0, err
    assert len(frames_of(tmp_path / "o.mp4")) == 11
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["prompts"] == [{"prompt": "a red ball", "chunk": 1, "mode": "recache", "over": 1}]
    assert report["stream"]["window"] == 6
    assert (report["seed"], report["size"]) == (4, [16, 24])
    assert len(report["denoise_s"]) == 3
    assert report["cache_bytes"] > 0
    assert report["end_to_end_fps"] == pytest.approx(report["denoise_fps"], rel=1) or report["denoise_fps"] > 0
    assert 0 < report["first_frame_latency_s"] < 60
    assert "first frame after" in out
    # Two layers in two steps and in the pass that writes the chunk before.
    assert [(x["layer"], x["step"]) for x in report["calls"]] == [(i, s) for s in (-1, 0, 1) for i in (0, 1)]
    assert {(x["method"], x["reason"]) for x in report["calls"]} == {("dense", "attention of the stream is dense")}
    assert [x["chunk"] for x in report["chunks"]] == [1, 2, 3]
    assert report["peak_memory_mib"]["process"] > 0
    assert report["environment"]["torch"] == torch.__version__
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.json", "o.mp4", "stream.yaml"]


def test_frames_of_the_preset_say_the_chunks(command, tmp_path):
    code, _, err = command("--prompt", "a red ball", "--num-frames", "8", "--output", "o.mp4", "--fps", "5")
    assert code == 0, err
    assert json.loads((tmp_path / "o.json").read_text())["fps"] == 5
    assert len(frames_of(tmp_path / "o.mp4")) == 11


def test_a_short_first_chunk_does_not_shorten_the_video(command, tmp_path):
    (tmp_path / "first.yaml").write_text("steps: [1000]\nchunk: 3\nfirst_chunk: 1\nwindow: 6\n")
    code, _, err = command(
        "--prompt", "a ball", "--num-frames", "11", "--output", "o.mp4", "--stream-settings", "first.yaml"
    )
    assert code == 0, err
    assert len(frames_of(tmp_path / "o.mp4")) == 13  # 6 latent frames are asked for, and chunks of 1, 3 and 3 made


def test_prompts_from_a_file_and_guidance_and_method(command, tmp_path):
    (tmp_path / "p.yaml").write_text("- {chunk: 3, prompt: blue, mode: blend, over: 2}\n- {prompt: red}\n")
    words = ["--prompts-file", "p.yaml", "--guidance-scale", "2", "--method", "radial"]
    code, out, err = command(*words, "--num-chunks", "4", "--output", "o.mp4")
    assert code == 0, err
    report = json.loads((tmp_path / "o.json").read_text())
    assert [(x["chunk"], x["prompt"], x["mode"]) for x in report["prompts"]] == [
        (1, "red", "recache"),
        (3, "blue", "blend"),
    ]
    assert report["stream"]["guidance_scale"] == 2
    assert "prompt from chunk 3: blue (blend)" in out


@pytest.mark.parametrize("name", ["light_forcing", "flashblock", "compressed_memory"])
def test_a_policy_is_chosen_like_a_method(command, tmp_path, name):
    three = SETTINGS.replace("500", "500, 200")  # flashblock attends the past anew in the first two steps
    (tmp_path / "stream.yaml").write_text(three)
    code, _, err = command("--prompt", "a red ball", "--num-chunks", "5", "--output", "dense.mp4")
    assert code == 0, err
    code, _, err = command("--prompt", "a red ball", "--num-chunks", "5", "--output", "o.mp4", "--method", name)
    assert code == 0, err
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["stream"]["attention"] == {"name": name, "parameters": {}}
    assert report["settings"] == {"method": name, "parameters": {}}
    assert {x["method"] for x in report["calls"]} == {name}
    assert any(x["reason"] is None and x["density"] < 1 for x in report["calls"])
    page = render_page(read_run(tmp_path / "o.json"))
    assert "density, realised" in page
    assert "over the last chunk" in page
    assert f"density {report['chunks'][4]['density']:.3f} in 8 calls" in page
    assert not np.array_equal(frames_of(tmp_path / "o.mp4"), frames_of(tmp_path / "dense.mp4"))


def test_settings_name_a_policy_with_parameters(command, tmp_path):
    words = ["--prompt", "a red ball", "--num-chunks", "2", "--output", "o.mp4"]
    (tmp_path / "stream.yaml").write_text(
        f"{SETTINGS}attention: {{name: compressed_memory, parameters: {{tile: [1, 2]}}}}"
    )
    code, _, err = command(*words)
    assert code == 0, err
    assert json.loads((tmp_path / "o.json").read_text())["stream"]["attention"]["name"] == "compressed_memory"
    (tmp_path / "stream.yaml").write_text(f"{SETTINGS}attention: {{name: light_forcing, parameters: {{top: 2}}}}")
    code, _, err = command(*words)
    assert (code, "stream.attention.parameters.top: unknown key" in err) == (2, True), err


def test_a_checkpoint_is_loaded(command, tmp_path, pipeline_folder):
    pipe = StreamingWanPipeline.from_preset("tiny-wan", str(pipeline_folder), window=9)
    assert pipe.stream_settings.window == 9
    weights = {k: torch.zeros_like(x) for k, x in pipe.transformer.state_dict().items()}
    torch.save({"generator": weights}, tmp_path / "w.pt")
    command("--prompt", "x", "--num-chunks", "1", "--output", "a.mp4")
    code, _, err = command("--prompt", "x", "--num-chunks", "1", "--output", "b.mp4", "--checkpoint", "w.pt")
    assert code == 0, err
    assert not np.array_equal(frames_of(tmp_path / "a.mp4"), frames_of(tmp_path / "b.mp4"))
    loaded = StreamingWanPipeline.from_preset(
        "tiny-wan", str(pipeline_folder), checkpoint=tmp_path / "w.pt", stream="longlive"
    )
    assert loaded.stream_settings.window == 12
    assert not any(x.any() for x in loaded.transformer.state_dict().values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-inference-steps", "3", "--prompt", "x"], "--num-inference-steps: a stream does not take it"),
        (["--backend", "torch", "--prompt", "x"], "--backend: a stream does not take it"),
        ([], "--prompt: expected a text"),
        (["--prompt", "x", "--density", "0.5"], "--density: a stream is dense unless"),
        (["--prompt", "x", "--method", "light_forcing", "--density", "0.5"], "parameters.density: unknown key"),
        (["--prompt", "x", "--method", "lightforcing"], "did you mean 'light_forcing'"),
        (["--prompt", "x", "--stream-settings", "longlife"], "did you mean 'longlive'"),
        (["--prompt", "x", "--stream-settings", "none.yaml"], "cannot read none.yaml"),
        (["--prompt", "x", "--output", "o.gif"], "ends in .mp4"),
        (["--prompt", "x", "--prompts-file", "none.yaml"], "cannot read none.yaml"),
        (["--prompt", "x", "--lora", "x.pt"], "lora: is merged into a checkpoint"),
        (["--prompt", "x", "--preset", "wan2.1-i2v-14b-480p"], "streams need wan t2v"),
        (["--prompt", "x", "--preset", "wan2.2-t2v-a14b-480p"], "a second transformer for noise levels below 0.875"),
        (["--prompt", "x", "--image", "none.png"], "--image: cannot read"),
        (["--prompt", "x", "--negative-prompt", "y"], "--negative-prompt: this stream runs without guidance"),
        (["--prompt", "x", "--num-chunks", 3, "--seconds", 20], "got --num-chunks 3 and --seconds 20.0"),
        (["--prompt", "x", "--num-chunks", 3, "--num-frames", 9], "got --num-chunks 3 and --num-frames 9"),
        (
            ["--prompts-file", "late.yaml", "--num-chunks", 3],
            "expected prompts for chunks 1 to 3, which",
        ),
        (["--prompt", "x", "--checkpoint", "none.pt"], "checkpoint: no such file: none.pt"),
    ],
)
def test_wrong_options_are_named_and_leave_no_file(command, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "late.yaml").write_text("- {prompt: a}\n- {prompt: b, chunk: 50}\n")
    code, _, err = command(*arguments)
    assert (code, message in err) == (2, True), err
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_size_that_the_preset_s_model_cannot_make_is_refused_before_it_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["generate-video", "--stream", "--prompt", "x", "--height", "65"])
    with pytest.raises(SystemExit) as left:
        generate.main()
    assert left.value.code == 2
    assert "generation.height: expected a multiple of" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["offload: {mode: model}", "compile: {}", "layerwise_casting: {}"])
def test_extras_that_streams_do_not_take_are_refused(extra, tmp_path, monkeypatch):
    monkeypatch.setattr("dit_accel.pipelines.streaming.pipeline.load_for_preset", lambda *_: pytest.fail("was loaded"))
    (tmp_path / "mine.yaml").write_text(f"extends: tiny-wan-causal\nextras: {{{extra}}}\n")
    with pytest.raises(ConfigError, match=rf"extras\.{extra.partition(':')[0]}: streams do without"):
        StreamingWanPipeline.from_preset(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"checkpoint": "none.pt"}, "checkpoint: no such file: none.pt"),
        ({"checkpoint": __file__, "lora": "none.pt"}, "lora: no such file: none.pt"),
        ({"stream": "longlife"}, "did you mean 'longlive'"),
        ({"windw": 3}, "did you mean 'window'"),
        ({"attention": {"name": "lightforcing"}}, "did you mean 'light_forcing'"),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_loaded(wrong, message, monkeypatch):
    monkeypatch.setattr("dit_accel.pipelines.streaming.pipeline.load_for_preset", lambda *_: pytest.fail("was loaded"))
    with pytest.raises(ConfigError, match=message):
        StreamingWanPipeline.from_preset("tiny-wan", **wrong)


def test_a_preset_says_how_its_model_streams(tmp_path, pipeline_folder):
    settings = stream_preset("rolling-forcing")
    preset = load_preset("tiny-wan").model_copy(update={"stream": settings, "repository": str(pipeline_folder)})
    path = tmp_path / "causal.yaml"
    path.write_text(preset.to_yaml())
    assert load_preset(path).stream == settings
    pipe = StreamingWanPipeline.from_preset(path, device="cpu")
    assert pipe.stream_settings == settings
    assert pipe.stream("a red ball").driver.noise.shape[-2:] == (16, 16)
    path.write_text(preset.to_yaml().replace("sink: 3", "sinks: 3"))
    with pytest.raises(ConfigError, match=r"stream.*sinks"):
        load_preset(path)


def test_a_model_streams_by_its_causal_sibling_unless_other_weights_are_given(tmp_path):
    assert streaming_preset("tiny-wan/radial").repository == "samples/tiny-wan-causal"
    assert streaming_preset("tiny-wan", own_weights=True) == load_preset("tiny-wan")
    assert streaming_preset("wan2.1-t2v-1.3b-480p") == load_preset("wan2.1-t2v-1.3b-480p")
    for name, changed in (("own", "repository: mine"), ("settings", "stream: {window: 12}")):
        path = tmp_path / f"{name}.yaml"
        path.write_text(f"extends: tiny-wan\n{changed}\n")
        assert streaming_preset(path) == load_preset(path)


OWN = """
extends: tiny-wan
generation: {height: 32, width: 48, fps: 5, negative_prompt: a blue square}
extras: {quantization: {backend: torchao}}
"""


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_a_file_says_holds_for_the_causal_sibling_too(tmp_path, is_whole):
    path = tmp_path / "mine.yaml"
    path.write_text(OWN)
    if is_whole:
        path.write_text(load_preset(path).to_yaml())
    found, sibling = streaming_preset(path), load_preset("tiny-wan-causal")
    assert (found.repository, found.stream, found.causal) == (sibling.repository, sibling.stream, None)
    said = {"height": 32, "width": 48, "fps": 5, "negative_prompt": "a blue square"}
    assert found.generation.model_dump(include=set(said)) == said
    if not is_whole:
        assert found.generation == sibling.generation.model_copy(update=said)
    assert found.extras.quantization.backend == "torchao"
    assert Studio(str(path), tmp_path).for_streams().preset == found
    path.write_text(OWN.replace("quantization: {backend: torchao}", "compile: {}"))
    with pytest.raises(ConfigError, match=r"extras\.compile: streams do without"):
        StreamingWanPipeline.from_preset(path)


def test_a_file_says_the_size_of_a_stream(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(OWN.partition("extras")[0])
    words = "generate-video --stream --preset mine.yaml --prompt x --num-chunks 1 --output o.mp4 --device cpu"
    monkeypatch.setattr(sys, "argv", words.split())
    with pytest.raises(SystemExit) as left:
        generate.main()
    assert left.value.code in (0, None)
    report = json.loads((tmp_path / "o.json").read_text())
    assert (report["size"], report["fps"]) == ([32, 48], 5)
    assert frames_of(tmp_path / "o.mp4").shape[1:3] == (32, 48)


def test_every_named_sibling_is_the_same_model_and_streams():
    named = {preset.name: preset.causal for preset in map(load_preset, list_presets()) if preset.causal is not None}
    assert "tiny-wan" in named
    for name, causal in named.items():
        base, sibling = load_preset(name), load_preset(causal)
        assert (sibling.model, sibling.family, sibling.task) == (base.model, base.family, base.task)
        assert sibling.stream is not None


def test_options_of_streams_need_the_flag(command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate-video", "--prompt", "x", "--num-chunks", "3"])
    with pytest.raises(SystemExit):
        generate.main()
    assert "--num-chunks: is for streams; add --stream" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {prompt: a}\n- {prompt: b}", "two prompts for one chunk"),
        ("- {prompt: a, mode: fade}", "0.mode"),
        ("- {promt: a}", "0.prompt"),
        ("prompt: a", "list"),
        ("- {prompt: a, chunk: 0}", "0.chunk"),
        ("- {prompt: a, mode: cut, over: 2}", "over is for mode blend"),
        ("- {prompt: a, mode: blend, over: 1}", "of at least 2 chunks, got 1 with mode blend"),
    ],
)
def test_prompts_files_are_checked(tmp_path, text, message):
    path = tmp_path / "p.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_prompts(path)


def test_typed_lines():
    assert parse_line("  \n") is None
    assert parse_line("a: colon stays").prompt == "a: colon stays"
    blend = parse_line("blend 4: a blue square\n")
    assert (blend.prompt, blend.mode, blend.over) == ("a blue square", "blend", 4)
    assert parse_line("blend: a blue square").over == BLEND_CHUNKS > 1
    assert parse_line("cutting: grass").mode == "recache"


def test_of_several_typed_lines_the_last_prompt_counts():
    live = LivePrompts(io.StringIO("one\ntwo\n\n"))
    deadline = time.time() + 10
    changes, ended = [], False
    while not ended and time.time() < deadline:
        state = live.look()
        changes += [state.change.prompt] if state.change else []
        ended = state.ended
    assert ended
    assert changes[-1] == "two"


@pytest.mark.parametrize("line", ["blend 0: x", "blend 1: x", "cut 3: x"])
def test_a_typed_line_that_is_wrong_does_not_end_the_stream(line, capsys):
    live = LivePrompts(io.StringIO(f"good\n{line}\n"))
    live._lines.put(None)
    while not (state := live.look()).ended:
        pass
    assert state.change is None or state.change.prompt == "good"
    assert "left out: typed prompt" in capsys.readouterr().err


def test_a_typed_line_that_is_no_text_ends_the_input(capsys):
    live = LivePrompts(io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8"))
    deadline = time.time() + 10
    while not (ended := live.look().ended) and time.time() < deadline:
        time.sleep(0.01)
    assert ended
    assert "no more prompts are read" in capsys.readouterr().err


def test_a_killed_writer_leaves_a_playable_file(tmp_path):
    path = tmp_path / "o.mp4"
    code = (
        "import sys, time, numpy as np\nfrom dit_accel.video.growing import StreamingVideoFile\n"
        "file = StreamingVideoFile(sys.argv[1], 8)\n"
        "rng = np.random.default_rng(0)\n"
        "for _ in range(5):\n    file.write(rng.random((8, 32, 32, 3)).astype('float32'))\n"
        "print('written', flush=True)\ntime.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, start_new_session=True)
    assert child.stdout.readline().strip() == b"written"
    deadline = time.time() + 20
    while time.time() < deadline and path.stat().st_size < 3000:
        time.sleep(0.1)
    # The whole group dies at once, the encoder with it: nobody finishes the file.
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    assert len(imageio.mimread(path)) >= 8


def test_a_killed_stream_leaves_a_playable_file(tmp_path, pipeline_folder):
    (tmp_path / "stream.yaml").write_text(f"{SETTINGS}positions: reindex\n")
    words = ["--stream", "--model", pipeline_folder, "--height", "16", "--width", "24", "--prompt", "a red ball"]
    words += ["--stream-settings", "stream.yaml", "--num-chunks", "5000", "--output", "o.mp4", "--fps", "4"]
    child = subprocess.Popen(
        [sys.executable, "-u", "-m", "dit_accel.cli", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        start_new_session=True,
        text=True,
    )
    for line in child.stdout:
        # The encoder is a process of its own, which may be behind where cores are few.
        if line.startswith("chunk") and (tmp_path / "o.mp4").read_bytes().count(b"moof") >= 2:
            break
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    # Every second of video is a fragment that is complete in itself.
    assert len(imageio.mimread(tmp_path / "o.mp4")) >= 4


def test_a_file_without_frames_leaves_nothing(tmp_path):
    with StreamingVideoFile(tmp_path / "new" / "o.mp4", 8):
        pass
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "old.mp4").write_bytes(b"kept")
    with StreamingVideoFile(tmp_path / "old.mp4", 8):
        pass
    assert (tmp_path / "old.mp4").read_bytes() == b"kept"
    with pytest.raises(ConfigError, match="cannot write"):
        StreamingVideoFile(tmp_path / "old.mp4" / "o.mp4", 8)
