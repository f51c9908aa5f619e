"""Comparison: candidates, pairing, tables, plot and videos."""

from __future__ import annotations

import csv
import sys

import imageio.v2 as imageio
import numpy as np
import pytest

from dit_accel import metrics
from dit_accel.cli import main
from dit_accel.compare import runner
from dit_accel.compare.candidates import CEILING, DENSE, all_candidates, parse_candidate, references
from dit_accel.compare.runner import Task, run_task
from dit_accel.compare.tables import pareto, plot_pareto, summarise, to_markdown
from dit_accel.compare.tasks import make_tasks
from dit_accel.compare.video import side_by_side
from dit_accel.errors import ConfigError
from dit_accel.metrics import IDENTICAL_PSNR, closeness, flicker, lpips, why_no_lpips
from dit_accel.presets import Generation, load_preset
from dit_accel.samples.tiny_random import random_wan_pipeline

BASE = load_preset("tiny-wan")
SMALL = Generation(height=48, width=48, num_frames=9, num_inference_steps=2, guidance_scale=2.0, fps=5)


def clip(seed, shape=(3, 16, 20, 3)):
    return np.random.default_rng(seed).random(shape)


def test_closeness_is_that_of_scikit_image():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = clip(0), clip(1)
    near = closeness(a, b)
    assert near.psnr == pytest.approx(peak_signal_noise_ratio(b, a, data_range=1.0))
    frames = [structural_similarity(x, y, channel_axis=-1, data_range=1.0) for x, y in zip(a, b, strict=True)]
    assert near.ssim == pytest.approx(np.mean(frames))
    same = closeness(a, a)
    assert (same.psnr, same.ssim) == (IDENTICAL_PSNR, pytest.approx(1.0))
    assert closeness(a[:, :4, :5], b[:, :4, :5]).psnr > 0
    with pytest.raises(ValueError, match="shapes"):
        closeness(a, b[:1])


def test_flicker_is_the_mean_change():
    still = np.full((4, 8, 8, 3), 0.3)
    assert flicker(still) == 0
    assert flicker(still[:1]) == 0
    blinking = still.copy()
    blinking[1::2] += 0.5
    assert flicker(blinking) == pytest.approx(0.5)


def test_lpips_needs_its_weights_and_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(metrics.util, "find_spec", lambda name: None if name == "torchvision" else object())
    assert why_no_lpips() == "torchvision is not installed"
    assert lpips(clip(0), clip(1)) is None
    monkeypatch.setattr(metrics.util, "find_spec", lambda name: object())
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    assert "alexnet" in (why_no_lpips() or "")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").touch()
    assert why_no_lpips() is None


def test_candidates_are_presets_or_methods():
    assert parse_candidate("tiny-wan/composed", BASE).method.name == "composed"
    made = parse_candidate("composed:density=0.2,tile=[2,4,4],dense_steps=2", BASE)
    assert (made.method.density, made.method.tile) == (0.2, (2, 4, 4))
    assert made.schedule.dense_steps == ((0, 2),)
    assert parse_candidate("radial", BASE).schedule.dense_steps == BASE.schedule.dense_steps
    assert parse_candidate("radial:", BASE).method == parse_candidate("radial", BASE).method


def test_a_method_keeps_the_schedules_of_both_experts():
    base = load_preset("wan2.2-t2v-a14b-720p/rectified")
    assert base.schedule_2 != base.schedule
    assert parse_candidate("radial", base).options["schedule_2"] == base.schedule_2
    made = parse_candidate("radial:dense_layers=4", base)
    assert (made.schedule.dense_layers, made.options["schedule_2"].dense_layers) == (((0, 4),), ((0, 4),))
    assert made.options["schedule_2"].dense_noise == base.schedule_2.dense_noise
    assert "schedule_2" not in parse_candidate("radial", BASE).options


def test_null_reaches_a_parameter_that_may_be_unset_and_no_other():
    by_mass = parse_candidate("composed:density=null,mass=0.9", BASE).method
    assert (by_mass.density, by_mass.mass) == (None, 0.9)
    assert parse_candidate("pbs:segment=null", BASE).method.segment is None
    with pytest.raises(ConfigError, match=r"method\.composed\.tile"):
        parse_candidate("composed:tile=null", BASE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("radail", "did you mean 'radial'"),
        ("radial:decay", "expected METHOD:KEY=VALUE"),
        ("composed:density=,mass=0.9", "expected METHOD:KEY=VALUE"),
        ("radial:decay=-1", "decay"),
        ("radial:tile=[2,", "expected METHOD:KEY=VALUE"),
        ("nowhere.yaml", "no such file"),
    ],
)
def test_a_wrong_candidate_is_refused(text, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        parse_candidate(text, BASE)


def test_dense_and_the_ceiling_stand_first_and_nothing_twice():
    labels = [c.label for c in all_candidates(["radial", "tiny-wan/dense", "radial"], BASE)]
    assert labels == [DENSE, CEILING, "radial"]
    assert next(c.label for c in all_candidates([], BASE, ceiling=False)) == DENSE
    assert "tiny-wan/composed" in [c.label for c in all_candidates([], BASE)]


def test_rounds_are_interleaved_and_ratios_paired(monkeypatch):
    """With a machine that slows down from call to call, ratios within a round stay near the truth."""
    order, clock = [], [1.0]

    def generate(pipe, generation, outcome, backend, inputs):
        order.append(outcome.candidate.label)
        clock[0] *= 1.5
        outcome.seconds.append(clock[0] * (1.0 if outcome.candidate.label == DENSE else 0.5))
        outcome.clip = clip(0)

    monkeypatch.setattr(runner, "_generate", generate)
    candidates = all_candidates(["radial"], BASE, ceiling=False)
    outcomes = run_task(None, SMALL, Task("x", 0), candidates, rounds=2)
    assert order == [DENSE, "radial", "radial", DENSE]
    assert outcomes[1].ratios == pytest.approx([2 / 1.5, 2 * 1.5])
    assert outcomes[0].ratios == [1, 1]


def row(name, ratio, psnr, **other):
    values = {"candidate": name, "ratio": ratio, "ratio_low": ratio - 0.1, "ratio_high": ratio + 0.1, "seconds": 2.0}
    fixed = {"density": 0.5, "ssim": 0.9, "lpips": None, "flicker": 0.2, "flicker_dense": 0.1, "peak_mib": None}
    return values | fixed | {"psnr": psnr} | other


def test_the_table_sums_up_and_marks_the_best(tmp_path):
    rows = [row(DENSE, 1.0, 100.0), row(CEILING, 0.9, 90.0), row("a", 1.5, 30.0, color=True)]
    rows += [row("a", 1.7, 32.0, color=False), row("b", 1.2, 40.0), row("c", 1.1, 35.0)]
    lines = {line.candidate: line for line in summarise(rows, ("color",))}
    assert lines["a"].ratio == pytest.approx(1.6)
    assert (lines["a"].ratio_low, lines["a"].ratio_high) == (pytest.approx(1.4), pytest.approx(1.8))
    assert lines["a"].follows == {"color": 0.5}
    assert lines["a"].flicker == pytest.approx(2.0)
    assert {name for name, line in lines.items() if line.is_best} == {"a", "b"}
    text = to_markdown(list(lines.values()), {"date": "today"})
    assert "| a | 2.00 s | 1.60x (1.40-1.80) | 0.500 | 31.0 | 0.9000 | 2.000x | yes |" in text
    assert "LPIPS" not in text
    plot_pareto(list(lines.values()), tmp_path / "p.png")
    assert imageio.imread(tmp_path / "p.png").shape[0] > 300


def test_pareto_keeps_what_nothing_beats():
    assert pareto([(1, 5), (2, 4), (2, 3), (1, 4), (3, 1)]) == [(1, 5), (2, 4), (3, 1)]


def test_clips_stand_side_by_side():
    clips = [("a", clip(0)), ("b" * 99, clip(1)), ("c", clip(2))]
    grid = side_by_side(clips)
    factor = 10  # 20 pixels become at least 192
    height, width = 22 + 16 * factor, 20 * factor
    assert grid.shape == (3, 2 * height, 2 * width, 3)
    assert (grid[0, 22:height:factor, :width:factor] == np.round(clips[0][1][0] * 255).astype(np.uint8)).all()
    assert not grid[:, height:, width:].any()


def test_tasks_of_the_small_model_are_judged_and_others_need_prompts():
    tasks, criteria = make_tasks(BASE, [], 3, seed=5)
    again, _ = make_tasks(BASE, [], 3, seed=5)
    assert [task.prompt for task in tasks] == [task.prompt for task in again]
    assert [task.seed for task in tasks] == [5, 6, 7]
    assert set(tasks[0].judge(np.zeros((3, 64, 64, 3), np.uint8))) == set(criteria)
    assert make_tasks(BASE, ["a", "b"], 3, seed=5)[0] == [Task("a", 5), Task("b", 6)]
    with pytest.raises(ConfigError, match="--prompts"):
        make_tasks(load_preset("wan2.1-t2v-1.3b-480p"), [], 3, seed=5)


def test_the_command_writes_everything(pipeline_folder, tmp_path, monkeypatch, capsys):
    preset = tmp_path / "small.yaml"
    sizes = "{height: 48, width: 48, num_frames: 9, num_inference_steps: 1}"
    preset.write_text(f"extends: tiny-wan/composed\ngeneration: {sizes}\nschedule: {{dense_steps: 0}}\n")
    target = tmp_path / "out"
    candidate = "composed:density=0.3,tile=[2,2,4]"
    arguments = ["compare", candidate, preset, "--preset", preset, "--model", pipeline_folder, "--num-prompts", 2]
    monkeypatch.setattr(sys, "argv", ["dit-accel", *map(str, [*arguments, "--rounds", 2, "--output", target])])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert (left.value.code or 0) == 0, capsys.readouterr().err
    rows = list(csv.DictReader((target / "compare.csv").open()))
    assert [r["candidate"] for r in rows] == [DENSE, CEILING, candidate, str(preset)] * 2
    dense, ceiling, sparse, shipped = rows[:4]
    assert shipped["method"] == "composed"
    assert float(shipped["density"]) != float(sparse["density"])
    assert float(dense["psnr"]) == IDENTICAL_PSNR
    assert float(ceiling["psnr"]) > 60  # rounding, and eight bits of nothing else
    assert float(sparse["psnr"]) < float(ceiling["psnr"])
    assert float(sparse["density"]) < 0.7
    assert float(ceiling["density"]) == 1.0
    assert dense["command"].startswith("dit-accel compare")
    assert dense["color"] in ("True", "False")
    for name in ("compare.md", "pareto.png", "side-by-side-0.mp4", "side-by-side-1.mp4"):
        assert (target / name).stat().st_size > 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 1, "comparing needs scikit-image: pip install 'dit_accel[metrics]'"),
        (["--backend", "troch"], 2, "unknown backend 'troch'"),
        (["--preset", "wan2.1-i2v-14b-480p", "--prompts", "x", "--image", "none.png"], 2, "cannot read none.png"),
    ],
)
def test_what_is_missing_is_said_before_a_model_is_loaded(arguments, code, message, monkeypatch, capsys):
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    if code == 1:
        monkeypatch.setattr(metrics.util, "find_spec", lambda name: None if name == "skimage" else object())
    monkeypatch.setattr(sys, "argv", ["dit-accel", "compare", "radial", *arguments])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == code
    assert message in capsys.readouterr().err


def test_a_preset_that_needs_an_image_says_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["dit-accel", "compare", "radial", "--preset", "wan2.1-i2v-14b-480p"])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert left.value.code == 2
    assert "--image" in capsys.readouterr().err


def test_the_tiny_model_of_a_preset_with_an_image_is_compared_at_its_own_size(tmp_path, monkeypatch, capsys):
    picture, target = tmp_path / "red.png", tmp_path / "out"
    imageio.imwrite(picture, np.full((40, 40, 3), (200, 0, 0), np.uint8))
    arguments = ["radial", "--preset", "wan2.2-ti2v-5b-i2v-720p", "--model", "tiny", "--image", picture]
    arguments += ["--prompts", "x", "--num-inference-steps", 1, "--no-ceiling", "--device", "cpu", "--output", target]
    monkeypatch.setattr(sys, "argv", ["dit-accel", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        main.main()
    assert (left.value.code or 0) == 0, capsys.readouterr().err
    assert [row["candidate"] for row in csv.DictReader((target / "compare.csv").open())] == [DENSE, "radial"]


def test_a_candidate_that_quantises_otherwise_is_refused(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny-wan\nextras: {quantization: {backend: torchao}}\n")
    with pytest.raises(ConfigError, match="quantises other than --preset tiny-wan"):
        all_candidates([str(path)], BASE)
    assert all_candidates([str(path)], load_preset(path))


def test_dense_runs_as_the_dense_steps_of_the_others_do(monkeypatch):
    """By the fastest dense attention: else a candidate would gain by its dense steps alone."""
    from dit_accel import engine

    seen, fastest_first = [], engine.fastest_first
    monkeypatch.setattr(engine, "fastest_first", lambda q: seen.append(q) or fastest_first(q))
    (outcome,) = run_task(random_wan_pipeline(), SMALL, Task("a red ball", 0), [references(BASE)[0]], rounds=1)
    assert outcome.density == 1.0
    assert seen
    assert outcome.to_dict(outcome.clip)["method"] == "dense"


def test_a_run_of_the_pipeline_measures_density_and_clip():
    candidates = all_candidates(["composed:density=0.3,tile=[2,2,4],dense_steps=1"], BASE, ceiling=False)
    outcomes = run_task(random_wan_pipeline(), SMALL, Task("a red ball", 0), candidates, rounds=1)
    assert outcomes[0].density == 1.0
    assert 0.5 < outcomes[1].density < 0.9  # one dense step of two
    assert outcomes[1].clip.shape == outcomes[0].clip.shape
