"""Presets: what ships resolves and round-trips; what is wrong is refused by its path before a model is loaded."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest

from dit_accel.errors import ConfigError
from dit_accel.estimate import (
    CPU,
    GPU,
    Machine,
    attention_share,
    estimate,
    saving,
    speed_up,
    token_layout,
)
from dit_accel.families.registry import family_names
from dit_accel.flow_shift import noise_levels
from dit_accel.methods.registry import list_methods
from dit_accel.presets import compose, list_presets, load_preset
from dit_accel.presets.files import merge, read_yaml
from dit_accel.samples.tiny_random import TINY
from dit_accel.schedule import Schedule

MODELS = [name for name in list_presets() if "/" not in name]


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_resolves_and_survives_export(name, tmp_path):
    preset = load_preset(name)
    exported = tmp_path / "exported.yaml"
    exported.write_text(preset.to_yaml())
    assert load_preset(exported) == preset
    assert preset.name == name
    assert preset.source
    guess = estimate(preset)
    # A published setting may not pay at the size of its model; the table then says so.
    assert guess.gain is None or guess.gain > 0.95


@pytest.mark.parametrize("name", MODELS)
def test_every_model_names_what_exists_and_has_the_four_profiles(name):
    preset = load_preset(name)
    assert preset.family in family_names()
    assert hasattr(diffusers, preset.pipeline)
    tiny = TINY[preset.tiny]
    assert (tiny.family, tiny.task, tiny.pipeline) == (preset.family, preset.task, preset.pipeline)
    variants = [load_preset(f"{name}/{variant}") for variant in ("dense", "quality", "balanced", "fast")]
    shares = [estimate(variant) for variant in variants]
    assert variants[0].method.name == "dense"
    assert sorted(shares, key=lambda e: e.gain) == shares
    assert all(variant.generation == preset.generation for variant in variants)


def test_every_method_has_a_preset_or_a_reason_why_not():
    page = (Path(__file__).parent.parent / "docs" / "presets.md").read_text()
    rows = page.split("| method | why |")[1].split("\n\n")[0].splitlines()[2:]
    without = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert without == set(list_methods()) - {load_preset(name).method.name for name in list_presets()}


def test_families_filter():
    assert "tiny-wan" in list_presets("wan")
    assert not [name for name in list_presets("flux") if "wan" in name]
    assert list_presets("none") == []


@pytest.mark.parametrize(
    ("name", "video", "text"),
    [
        ("wan2.1-t2v-1.3b-480p", 32_760, 0),
        ("wan2.1-t2v-14b-720p", 75_600, 0),
        ("wan2.2-ti2v-5b-720p", 27_280, 0),
        ("hunyuan-video-t2v-720p", 118_800, 256),
        ("flux1-dev", 4_096, 512),
        ("flux1-dev-4k", 65_536, 512),
        ("flux1-kontext-dev", 8_192, 512),
        ("cogvideox-5b", 17_550, 226),
        ("cogvideox1.5-5b", 44_880, 226),
    ],
)
def test_token_counts_of_published_sizes(name, video, text):
    preset = load_preset(name)
    layout = token_layout(preset.model, preset.generation)
    assert (layout.video, layout.text) == (video, text)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("wan2.1-t2v-14b-720p", 0.718),
        ("wan2.1-t2v-1.3b-480p", 0.699),
        ("wan2.1-t2v-14b-480p", 0.524),
        ("hunyuan-video-t2v-720p", 0.866),
        ("flux1-dev", 0.200),
        ("flux1-dev-4k", 0.782),
        ("cogvideox-5b", 0.491),
    ],
)
def test_attention_share_of_published_models(name, share):
    preset = load_preset(name)
    tokens = token_layout(preset.model, preset.generation).tokens
    assert attention_share(preset.model, tokens) == pytest.approx(share, abs=1e-3)


def test_amdahl():
    ideal = Machine("ideal", 1.0, 0.0, "nothing lost")
    assert speed_up(0.718, saving(0.2, ideal)) == pytest.approx(2.35, abs=0.01)
    assert speed_up(0.5, saving(1.0, ideal)) == 1.0
    assert saving(0.9, Machine("slow", 0.8, 0.0, "above its break-even a call runs dense")) == 0.0


def measured_as_presets_run():
    """Rows of single calls with the method and parameters of a profile, at any density, on the CPU."""
    table = Path(__file__).parent.parent / "docs" / "results" / "attention-amd-epyc.csv"
    profiles = [load_preset(f"{model}/balanced").method for model in ("wan2.1-t2v-1.3b-480p", "flux1-dev")]
    kept = [{**method.parameters, "density": None} for method in profiles]
    rows = [row for row in csv.DictReader(table.open()) if row["method"] == "composed" and row["ratio"]]
    return [row for row in rows if {**json.loads(row["parameters"]), "density": None} in kept]


def test_the_cpu_assumptions_are_those_of_the_measurements():
    rows = measured_as_presets_run()
    assert {row["shape"] for row in rows} == {"cpu-4k", "wan-1.3b", "cogvideox", "flux-1k", "flux-2k"}
    densities, gains = (np.array([float(row[name]) for row in rows]) for name in ("density", "ratio"))
    slope, overhead = np.polyfit(densities, 1 / gains, 1)
    assert pytest.approx(1 / slope, abs=0.01) == CPU.efficiency
    assert overhead == pytest.approx(CPU.overhead, abs=0.01)
    predicted = 1 / (densities / CPU.efficiency + CPU.overhead)
    np.testing.assert_allclose(predicted, gains, rtol=0.2)


@pytest.mark.parametrize(
    ("name", "shape"), [("flux1-dev", "flux-1k"), ("cogvideox-5b", "cogvideox"), ("wan2.1-t2v-1.3b-480p", "wan-1.3b")]
)
def test_the_expected_density_is_that_of_the_measurements(name, shape):
    preset = load_preset(f"{name}/balanced")
    requested = preset.method.parameters["density"]
    rows = [row for row in measured_as_presets_run() if row["shape"] == shape]
    (density,) = [float(row["density"]) for row in rows if float(row["requested_density"]) == requested]
    # Rows of text attend to everything, and a density becomes a number of blocks.
    assert estimate(preset).density == pytest.approx(density, abs=0.005)


def test_the_machine_changes_the_prediction():
    preset = load_preset("wan2.1-t2v-14b-720p/fast")
    assert estimate(preset, CPU).gain < estimate(preset, GPU).gain


def test_dense_share_counts_steps_layers_noise_and_both_experts(tmp_path):
    assert noise_levels(4, 1.0) == [1.0, 0.75, 0.5, 0.25]
    assert noise_levels(4, 3.0) == pytest.approx([1.0, 0.9, 0.75, 0.5])
    text = "extends: wan2.2-i2v-a14b-720p/fast\ngeneration: {num_inference_steps: 10}\n"
    first = load_preset(written(tmp_path, text + "schedule: {dense_steps: 2, dense_layers: 4}"))
    assert estimate(first).dense_share == pytest.approx(1 - 0.8 * 0.9)
    second = load_preset(written(tmp_path, text + "schedule: {dense_steps: []}\nschedule_2: {dense_noise: [0, 1]}"))
    low = sum(level < 0.9 for level in noise_levels(10, 5.0)) / 10
    assert estimate(second).dense_share == pytest.approx(low)
    assert 0 < low < 1


def test_the_estimate_counts_overrides_of_layers_and_of_the_second_expert(tmp_path):
    text = (
        "extends: wan2.2-i2v-a14b-720p/fast\ngeneration: {num_inference_steps: 10}\n"
        "method: {name: composed, parameters: {density: 0.2}}\nschedule: {dense_steps: [], dense_layers: []}\n"
    )
    changed = "{dense_steps: [], dense_layers: [], overrides: [{layers: [[0, 10]], parameters: {density: 0.6}}]}"
    plain = estimate(load_preset(written(tmp_path, text)))
    assert plain.density == pytest.approx(0.2)
    first = estimate(load_preset(written(tmp_path, text.replace("{dense_steps: [], dense_layers: []}", changed))))
    assert first.density == pytest.approx((10 * 0.6 + 30 * 0.2) / 40)
    assert first.gain < plain.gain
    low = sum(level < 0.9 for level in noise_levels(10, 5.0)) / 10
    second = estimate(load_preset(written(tmp_path, f"{text}schedule_2: {changed}\n")))
    assert second.density == pytest.approx((1 - low) * 0.2 + low * 0.3)


@pytest.mark.parametrize(
    ("name", "clusters", "dense_steps", "dense_layers", "steps"),
    [
        ("wan2.1-t2v-14b-720p", 300, 10, 1, 50),  # scripts/{wan,hyvideo}/*_sap.sh of svg-project/Sparse-VideoGen
        ("wan2.1-i2v-14b-720p", 300, 14, 1, 40),
        ("wan2.1-i2v-14b-480p", 200, 8, 1, 40),
        ("hunyuan-video-t2v-720p", 400, 5, 1, 50),
        ("hunyuan-video-t2v-540p", 200, 2, 0, 50),
    ],
)
def test_svg2_has_the_settings_of_its_scripts(name, clusters, dense_steps, dense_layers, steps):
    preset = load_preset(f"{name}/svg2")
    assert preset.method.parameters == {
        "query_clusters": clusters,
        "key_clusters": 1000,
        "mass": 0.9,
        "least": 0.1,
        "first_iterations": 50,
        "iterations": 2,
    }
    assert preset.schedule == Schedule(dense_steps=dense_steps, dense_layers=dense_layers)
    assert preset.generation.num_inference_steps == steps


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("wan2.1-t2v-14b-720p/psa", (69, 720, 1280)),  # examples/configs/model_configs.py of the released code
        ("wan2.1-t2v-1.3b-480p/psa", (69, 720, 1280)),
        ("wan2.1-t2v-1.3b-480p/psa-topk", (69, 720, 1280)),
        ("wan2.2-t2v-a14b-720p/psa", (69, 768, 1280)),
        ("wan2.2-ti2v-5b-720p/psa", (121, 704, 1280)),
        ("cogvideox1.5-5b/psa", (81, 768, 1360)),
        ("cogvideox-5b/psa", (49, 480, 720)),
        ("cogvideox-5b/psa-distilled", (49, 480, 720)),
    ],
)
def test_psa_says_where_it_was_published_for_another_size(name, published):
    preset = load_preset(name)
    own = (preset.generation.num_frames, preset.generation.height, preset.generation.width)
    said = re.search(r"published for (\d+) frames(?: of (\d+) x (\d+))?", preset.source)
    values = (
        own
        if said is None
        else tuple(int(word) if word else mine for word, mine in zip(said.groups(), own, strict=True))
    )
    assert values == published


def test_a_published_setting_of_an_unknown_method_or_model_is_refused(monkeypatch):
    data = read_yaml("method: radail\nsource: s\nsettings: [{models: [tiny-wan]}]", "x.yaml")
    published = list(compose.settings_of("x.yaml", data, {"tiny-wan"}))
    assert [(variant, model) for variant, model, _ in published] == [("radail", "tiny-wan")]
    compose.models.cache_clear()
    try:
        name, model, values = published[0]
        monkeypatch.setitem(compose.models()[model][1], name, values)
        with pytest.raises(ConfigError, match="unknown method 'radail'; did you mean 'radial'"):
            load_preset("tiny-wan/radail")
    finally:
        compose.models.cache_clear()
    for text, message in (
        ("settings: [{models: [tiny-wam]}]", "unknown model 'tiny-wam'; did you mean 'tiny-wan'"),
        ("settings: [{models: [tiny-wan], shedule: {}}]", "unknown key; did you mean 'schedule'"),
    ):
        data = read_yaml(f"method: radial\nsource: s\n{text}", "x.yaml")
        with pytest.raises(ConfigError, match=message):
            list(compose.settings_of("x.yaml", data, {"tiny-wan"}))


def test_merging_leaves_both_sides_alone():
    base, over = {"a": {"b": [1]}}, {"a": {"c": [2]}}
    merged = merge(base, over)
    merged["a"]["b"].append(3)
    merged["a"]["c"].append(3)
    assert (base, over) == ({"a": {"b": [1]}}, {"a": {"c": [2]}})


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_extends_a_preset(tmp_path):
    preset = load_preset(
        written(
            tmp_path,
            "extends: tiny-wan/radial\ngeneration: {num_inference_steps: 7}\nmethod: {parameters: {decay: 0.5}}",
        )
    )
    assert preset.name == "tiny-wan/radial"
    assert preset.generation.num_inference_steps == 7
    assert preset.method.parameters["decay"] == 0.5
    assert preset.method.parameters["block"] == 64


def test_another_method_or_cache_does_not_inherit_parameters(tmp_path):
    preset = load_preset(written(tmp_path, "extends: tiny-wan/radial\nmethod: {name: dense}"))
    assert preset.method.parameters == {}
    cached = written(tmp_path, "extends: tiny-wan\nextras: {cache: {name: first_block, parameters: {threshold: 0.1}}}")
    assert load_preset(cached).extras.cache.parameters == {"threshold": 0.1}


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("method: {parameters: {decay: .nan}}", "method.radial.decay", "finite"),
        ("method: {parameters: {dencity: 0.2}}", "method.radial.dencity", "did you mean 'density'"),
        ("generation: {num_framse: 9}", "generation.num_framse", "did you mean 'num_frames'"),
        ("generation: {num_frames: true}", "generation.num_frames", "integer"),
        ("generation: {guidance_scale: .nan}", "generation.guidance_scale", "finite"),
        ("generation: {height: 81}", "height", "multiple of 16, got 81; 80 would do"),
        ("generation: {num_frames: 20}", "num_frames", "1 plus a multiple of 2"),
        ("generation: {guidance_scale_2: 3.0}", "guidance_scale_2", "one transformer"),
        ("schedule_2: {dense_steps: 1}", "schedule_2", "one transformer"),
        ("schedule: {dense_steps: [[0, 4], [2, 6]]}", "schedule", "overlaps"),
        (
            "schedule: {overrides: [{layers: 2, parameters: {dencity: 0.2}}]}",
            "method.radial.dencity",
            "did you mean 'density'",
        ),
        ("task: t2w", "task", "'t2v'"),
        ("task: t2i", "generation.num_frames", "makes one image"),
        ("method: {name: radail}", "method", "did you mean 'radial'"),
        ("extras: {cash: {}}", "extras.cash", "did you mean 'cache'"),
        ("extras: {cache: {name: teacache}}", "extras.cache.name", "'first_block'"),
        (
            "extras: {cache: {name: first_block, parameters: {treshold: 0.1}}}",
            "extras.cache.parameters.treshold",
            "did you mean 'threshold'",
        ),
        ("extras: {cache: {name: first_block, parameters: {threshold: .nan}}}", "parameters.threshold", "finite"),
        ("extras: {cache: {name: mag, parameters: {max_skip_steps: true}}}", "parameters.max_skip_steps", "integer"),
        (
            "extras: {cache: {name: taylorseer, parameters: {taylor_factors_dtype: int8}}}",
            "parameters.taylor_factors_dtype",
            "'float32'",
        ),
        ("extras: {compile: {fullgraph: true}}", "extras.compile.fullgraph", "graphs break at sparse attention"),
        ("extras: {offload: {mode: group, blocks: 2}}", "extras.offload.blocks", "except for type block_level"),
        ("extras: {offload: {mode: group, type: block_level}}", "extras.offload.blocks", "a number of blocks"),
        ("extras: {offload: {mode: model, stream: true}}", "extras.offload.stream", "is for mode group"),
        ("extras: {offload: {mode: sequential}, compile: {}}", "extras.offload.mode", "use group offload"),
        (
            "extras: {layerwise_casting: {}, quantization: {backend: torchao}}",
            "extras.layerwise_casting",
            "choose one of the two",
        ),
        ("a: [1", "mine.yaml", "not YAML: line"),
        ("extends: tiny-wan", "mine.yaml", "key given twice: extends"),
    ],
)
def test_faults_name_the_place(tmp_path, text, path, message):
    with pytest.raises(ConfigError) as caught:
        load_preset(written(tmp_path, f"extends: tiny-wan/radial\n{text}"))
    assert path in caught.value.path
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("extends: tiny-wam", "preset", "did you mean 'tiny-wan'"),
        ("extends: tiny-wan/radail", "preset", "did you mean 'tiny-wan/radial'"),
        ("extends: [tiny-wan]", "extends", "expected the name of a preset"),
        ("- 1", "mine.yaml", "expected a mapping, got list"),
        ("!!python/object:os.system {}", "mine.yaml", "not YAML"),
    ],
)
def test_files_that_are_no_presets_are_refused(tmp_path, text, path, message):
    with pytest.raises(ConfigError) as caught:
        load_preset(written(tmp_path, text))
    assert path in caught.value.path
    assert message in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no such file: nowhere\.yaml"):
        load_preset("nowhere.yaml")
