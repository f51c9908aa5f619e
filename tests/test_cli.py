"""Both commands, in a process of their own where that matters, else in this one."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import yaml
from PIL import Image

from dit_accel import doctor
from dit_accel.cli import generate, main
from dit_accel.cli.app import dashes
from dit_accel.cli.inputs import open_image
from dit_accel.estimate import block_parameters
from dit_accel.kernels import products
from dit_accel.presets import load_preset
from dit_accel.video.files import write_mp4

SMALL = ["--height", "32", "--width", "48", "--num-frames", "9", "--num-inference-steps", "2"]


def run(monkeypatch, capsys, entry, *arguments):
    """Call a command's entry point: exit code, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        entry()
    captured = capsys.readouterr()
    return left.value.code or 0, captured.out, captured.err


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *arguments: run(monkeypatch, capsys, generate.main, *arguments)


def test_a_prompt_becomes_a_video_and_a_report(command, pipeline_folder, tmp_path):
    code, out, err = command("--prompt", "a red ball", "--model", pipeline_folder, "--output", "clip.mp4", *SMALL)
    assert code == 0, err
    assert "video: clip.mp4" in out
    assert "report: clip.json" in out
    assert len(imageio.mimread(tmp_path / "clip.mp4")) == 9
    report = json.loads((tmp_path / "clip.json").read_text())
    assert report["prompt"] == "a red ball"
    assert report["preset"]["name"] == "tiny-wan"
    assert len(report["times"]["steps"]) == 2
    assert sum(report["dense_reasons"].values()) == len(report["calls"]) == 2 * 2 * 2
    assert report["environment"]["torch"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["clip.json", "clip.mp4"]


def test_every_flag_is_obeyed(command, pipeline_folder, tmp_path):
    settings = ["--method", "radial", "--density", "0.9", "--dense_steps", "1", "--seed", "7", "--fps", "5"]
    files = ["--output", "o.gif", "--report", "r.json", "--backend", "torch", "--device", "cpu", "--dtype", "float32"]
    words = ["--prompt", "x", "--negative-prompt", "blue", "--guidance-scale", "2.5"]
    code, _, err = command(*words, "--model", pipeline_folder, *SMALL, *settings, *files)
    assert code == 0, err
    report = json.loads((tmp_path / "r.json").read_text())
    generation = report["preset"]["generation"]
    assert generation["guidance_scale"] == 2.5
    assert generation["negative_prompt"] == "blue"
    assert generation["fps"] == 5
    assert report["seed"] == 7
    assert report["preset"]["method"]["parameters"]["density"] == 0.9
    assert {c["step"] for c in report["calls"] if "dense_steps" in (c["reason"] or "")} == {0}
    assert report["settings"]["backend"] == "torch"


def test_the_default_name_never_comes_from_the_prompt(command, pipeline_folder, tmp_path):
    code, _, err = command("--prompt", "../../evil/日本語", "--model", pipeline_folder, *SMALL)
    assert code == 0, err
    (video,) = (tmp_path / "outputs").glob("*.mp4")
    assert video.name.endswith("tiny-wan-seed0.mp4")


def test_the_same_seed_gives_the_same_file(command, pipeline_folder, tmp_path):
    for name in ("a.png", "b.png"):
        assert command("--prompt", "x", "--model", pipeline_folder, "--output", name, *SMALL)[0] == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_dry_run_shows_tokens_and_gain_and_loads_nothing(command):
    code, out, _ = command("--preset", "wan2.1-t2v-14b-720p", "--dry-run")
    assert code == 0
    assert "video tokens: 75600" in out
    assert "72% of the transformer's operations" in out
    assert "predicted gain" in out
    assert "not loaded" in out


def test_the_guard_is_an_option_that_a_dry_run_shows_and_both_experts_get(command):
    code, out, err = command("--preset", "wan2.2-t2v-a14b-720p/rectified", "--max-error", "0.05", "--dry-run")
    assert code == 0, err
    assert load_preset("wan2.2-t2v-a14b-720p/rectified").schedule_2.max_error is None
    shown = yaml.safe_load(out[: out.index("\nmodel: ")])
    assert (shown["schedule"]["max_error"], shown["schedule_2"]["max_error"]) == (0.05, 0.05)


def test_the_guard_measures_in_a_run(command, pipeline_folder, tmp_path):
    words = [
        "--prompt",
        "x",
        "--model",
        pipeline_folder,
        "--method",
        "composed",
        "--density",
        "0.2",
        "--dense-steps",
        "0",
    ]
    size = ["--height", "112", "--width", "112", "--num-frames", "17", "--num-inference-steps", "1"]
    code, _, err = command(*words, *size, "--max-error", "9", "--output", "o.gif")
    assert code == 0, err
    report = json.loads((tmp_path / "o.json").read_text())
    assert report["preset"]["schedule"]["max_error"] == 9
    sparse = [call for call in report["calls"] if call["reason"] is None]
    assert sparse
    assert all(0 < call["error"] < call["error_bound"] for call in sparse)


def test_a_dry_run_speaks_of_the_machine_at_hand(command):
    on_cpu = command("--preset", "flux1-dev-4k/fast", "--dry-run", "--device", "cpu")[1]
    on_gpu = command("--preset", "flux1-dev-4k/fast", "--dry-run", "--device", "cuda")[1]
    assert "image tokens: 65536 (1 x 256 x 256), and 512 of text" in on_cpu
    assert "on a CPU" in on_cpu
    assert "attention-amd-epyc.csv" in on_cpu
    assert "on a GPU" in on_gpu
    tiny = command("--preset", "flux1-dev/fast", "--dry-run", "--model", "tiny")[1]
    assert "height: 32" in tiny
    assert "no prediction" in tiny


def test_an_image_preset_makes_a_png_on_the_tiny_model(command, tmp_path):
    size = ["--height", "256", "--width", "192", "--num-inference-steps", "3", "--dense-steps", "1"]
    code, out, err = command("--preset", "flux1-dev/fast", "--model", "tiny", "--prompt", "x", *size)
    assert code == 0, err
    (image,) = (tmp_path / "outputs").glob("*.png")
    assert "image: outputs" in out
    assert imageio.imread(image).shape == (256, 192, 3)
    report = json.loads(image.with_suffix(".json").read_text())
    assert report["model"] == "tiny"
    assert {call["step"] for call in report["calls"] if call["reason"] is None} == {1, 2}
    assert len(report["times"]["steps"]) == 3


def write_inputs(folder):
    rng = np.random.default_rng(0)
    imageio.imwrite(folder / "a.png", rng.integers(0, 255, (40, 60, 3), dtype=np.uint8))
    imageio.imwrite(folder / "m.png", np.full((40, 60), 255, np.uint8))
    write_mp4(folder / "v.mp4", rng.integers(0, 255, (9, 32, 48, 3), dtype=np.uint8), 8)


@pytest.mark.parametrize(
    ("preset", "inputs", "suffix"),
    [
        ("wan2.1-i2v-14b-480p", ["--image", "a.png"], "mp4"),
        ("wan2.1-flf2v-14b-720p", ["--image", "a.png", "--last-image", "a.png"], "mp4"),
        ("cogvideox-5b-i2v", ["--image", "a.png"], "gif"),
        ("hunyuan-video-i2v-720p", ["--image", "a.png"], "mp4"),
        ("flux1-kontext-dev", ["--image", "a.png"], "png"),
        ("flux2-dev-edit", ["--image", "a.png"], "png"),
        ("flux1-fill-dev", ["--image", "a.png", "--mask", "m.png"], "png"),
        ("wan2.1-vace-1.3b-480p", ["--image", "a.png", "--video", "v.mp4"], "mp4"),
        ("hunyuan-video-1.5-i2v-480p", ["--image", "a.png"], "mp4"),
        ("hunyuan-video-1.5-t2v-480p", ["--guidance-scale", "3.0"], "mp4"),
    ],
)
def test_inputs_reach_the_pipelines_that_need_them(command, tmp_path, preset, inputs, suffix):
    write_inputs(tmp_path)
    made = f"o.{suffix}"
    short = ["--prompt", "x", "--num-inference-steps", "2", "--dense-steps", "1", "--output", made]
    code, _, err = command("--preset", preset, "--model", "tiny", *short, *inputs)
    assert code == 0, err
    assert (tmp_path / made).stat().st_size > 0
    report = json.loads((tmp_path / "o.json").read_text())
    assert len(report["times"]["steps"]) == 2


@pytest.mark.parametrize(
    ("name", "billions"),
    [("wan2.1-t2v-1.3b-480p", 1.42), ("wan2.1-t2v-14b-720p", 14.3), ("wan2.2-t2v-a14b-720p", 28.6)],
)
def test_the_doctor_weighs_models_as_published(name, billions, monkeypatch):
    assert block_parameters(load_preset(name).model) == pytest.approx(billions * 1e9, rel=0.03)
    size = doctor.here()[1][0].itemsize * block_parameters(load_preset(name).model)
    for free, verdict in ((size, " fit into"), (size - 1, " do not fit into")):
        monkeypatch.setattr(doctor, "available_bytes", lambda device, free=free: free)
        assert verdict in dict(doctor.weights("wan"))[name]


def test_the_doctor_does_not_promise_what_weights_of_text_may_take(monkeypatch):
    least = block_parameters(load_preset("flux1-dev").model) * doctor.here()[1][0].itemsize
    for free, verdict in ((2 * least, ", fit into"), (2 * least - 1, ", may fit"), (least - 1, ", do not fit")):
        monkeypatch.setattr(doctor, "available_bytes", lambda device, free=free: free)
        assert verdict in dict(doctor.weights("flux"))["flux1-dev"]


def test_presets_are_listed(command):
    code, out, _ = command("--list-presets")
    assert code == 0
    assert "tiny-wan/dense" in out.split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "tiny-wam", "--prompt", "x"], "did you mean 'tiny-wan'"),
        (["--prompt", "x", "--density", "nan"], "finite"),
        (["--prompt", "x", "--backend", "troch", "--dry-run"], "unknown backend 'troch'; did you mean 'torch'"),
        (["--prompt", "x", "--seed", str(2**64)], "Invalid value for '--seed'"),
        (["--prompt", "x", "--output", "clip.mp4", "--report", "clip.mp4"], "is the result itself"),
        (["--prompt", "x", "--density", "1.5"], "less than or equal to 1"),
        (["--prompt", "x", "--max-error", "0"], "schedule.max_error"),
        (["--prompt", "x", "--max-error", "0.1", "--method", "dense"], "--max-error: preset tiny-wan runs dense"),
        (["--prompt", "x", "--max-error", "0.1", "--num-frames", "9"], "tokens are too few to check"),
        (["--prompt", "x", "--max-error", "0.1", "--stream"], "--max-error: a stream does not take it"),
        (["--prompt", "x", "--height", "81"], "generation.height: expected a multiple of 16, got 81; 80 would do"),
        (["--prompt", "x", "--num-frames", "10"], "1 plus a multiple of 2"),
        (["--prompt", "x", "--num-inference-steps", "0"], "generation.num_inference_steps"),
        (["--prompt", "x", "--method", "radail"], "did you mean 'radial'"),
        (["--prompt", "x", "--output", "clip.avi"], "ends in .mp4"),
        (["--prompt", "x", "--output", "/proc/none/clip.mp4"], "cannot write in"),
        (["--prompt", "x", "--model", "nowhere"], "no such folder: nowhere"),
        (["--prompt", "x", "--model", "."], "not a Diffusers pipeline"),
        (["--prompt", "x", "--device", "cuda"], "no CUDA device"),
        (["--prompt", "x", "--device", "mps"], "device: mps cannot be used here"),
        (["--prompt", "x", "--dtype", "int8"], "expected one of auto, float32"),
        (["--prompt", "x", "--image", "a.png"], "does not take an image"),
        (["--prompt", "x", "--preset", "wan2.1-i2v-14b-480p"], "needs an image"),
        (["--preset", "wan2.1-flf2v-14b-720p", "--prompt", "x", "--image", "a.png"], "needs a last image"),
        (["--preset", "flux1-fill-dev", "--prompt", "x", "--image", "a.png"], "needs a mask"),
        (["--preset", "flux1-dev", "--prompt", "x", "--video", "a.mp4"], "does not take a control video"),
        (["--preset", "flux1-dev", "--prompt", "x", "--num-frames", "9"], "makes one image"),
        (["--preset", "flux1-dev", "--prompt", "x", "--fps", "9"], "has no frame rate"),
        (["--preset", "flux1-dev", "--prompt", "x", "--output", "a.mp4"], "makes an image"),
        (["--preset", "flux1-dev", "--prompt", "x", "--negative-prompt", "y"], "only with --true-cfg-scale above 1"),
        (["--preset", "flux1-fill-dev", "--prompt", "x", "--negative-prompt", "y"], "takes no negative_prompt"),
        (["--preset", "cogvideox-5b", "--prompt", "x", "--true-cfg-scale", "2"], "takes no true_cfg_scale"),
        (["--prompt", "x", "--guidance-scale-2", "3"], "models with two experts"),
        (
            ["--preset", "wan2.1-i2v-14b-480p", "--prompt", "x", "--model", "tiny", "--image", "none.png"],
            "cannot read none.png as an image",
        ),
        (
            ["--preset", "hunyuan-video-1.5-i2v-480p", "--prompt", "x", "--height", "64"],
            "takes no height; the size follows the image",
        ),
        ([], "--prompt"),
        (["--no-such-flag"], "No such option"),
        (["--seed", "true", "--prompt", "x"], "valid integer"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(command, arguments, message, pipeline_folder, tmp_path):
    if "--device" in arguments or "--dtype" in arguments:
        arguments = [*arguments, "--model", str(pipeline_folder)]
    code, _, err = command(*arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_backend_that_cannot_run_here_fails_with_one_line_and_leaves_no_file(command, pipeline_folder, tmp_path):
    arguments = ["--prompt", "x", "--model", pipeline_folder, "--backend", "triton", "--density", "0.5", *SMALL]
    code, _, err = command(*arguments, "--method", "radial", "--dense-steps", "0", "--output", "clip.mp4")
    assert code == 1
    assert "error: backend 'triton' cannot run this call" in err
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_the_terminal_cannot_show_is_no_reason_to_fail(monkeypatch, tmp_path):
    """Redirected output on Windows and in some containers is not UTF-8."""
    monkeypatch.chdir(tmp_path)
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["dit-accel", "presets", "show", "tiny-wan", "--export", "球.yaml"])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert not left.value.code
    out.flush()
    assert b"written: \\u7403.yaml" in out.buffer.getvalue()


def test_pictures_of_cameras_stand_upright(tmp_path):
    """A camera that was turned says so in the file alone; Diffusers' own loader turns the picture too."""
    picture, exif = Image.new("RGB", (6, 4), "red"), Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    picture.save(tmp_path / "photo.jpg", exif=exif)
    assert open_image(tmp_path / "photo.jpg", "--image").size == (4, 6)


def test_underscores_become_dashes_in_names_of_options_only():
    assert dashes(["--num_frames=9", "--prompt", "a_b", "x_y"]) == ["--num-frames=9", "--prompt", "a_b", "x_y"]


def test_an_interrupt_leaves_130_and_no_file(pipeline_folder, tmp_path):
    arguments = [sys.executable, "-c", "from dit_accel.cli.generate import main; main()", "--prompt", "x"]
    size = ["--height", "32", "--width", "48", "--num-frames", "9", "--num-inference-steps", "100000"]
    process = subprocess.Popen(
        [*arguments, "--model", str(pipeline_folder), "--output", "clip.mp4", *size],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore interrupts, and their children would too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        # Not while modules are imported: Python drops an interrupt that arrives while it destroys an object.
        assert any(b"loaded in" in line for line in process.stdout)
        assert list(tmp_path.glob(".partial-*"))
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert b"Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_dit_accel_lists_shows_and_examines(monkeypatch, capsys, tmp_path):
    code, out, _ = run(monkeypatch, capsys, main.main, "presets", "--family", "wan")
    assert code == 0
    assert "tiny-wan" in out
    exported = Path(tmp_path / "p.yaml")
    assert run(monkeypatch, capsys, main.main, "presets", "show", "tiny-wan", "--export", exported)[0] == 0
    assert "name: tiny-wan" in exported.read_text()
    assert "radial" in run(monkeypatch, capsys, main.main, "methods")[1]
    shown = run(monkeypatch, capsys, main.main, "methods", "show", "radial")[1]
    assert "arXiv 2506.19852" in shown
    assert "decay: 1.0" in shown
    told = run(monkeypatch, capsys, main.main, "doctor")[1]
    assert "backend torch: usable" in told
    (small,) = [line for line in told.splitlines() if line.startswith("weights") and "tiny-wan" in line]
    assert "about 0.1 GiB in" in small
    assert " fit into " in small
    assert f"fp32 products on the CPU: {products.library()}" in told
    assert run(monkeypatch, capsys, main.main, "methods", "show", "radail")[0] == 2
