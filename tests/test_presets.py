"""Presets: what ships resolves and round-trips; what is wrong is refused by its path before a model is loaded."""

from __future__ import annotations

import pytest

from dit_accel.errors import ConfigError
from dit_accel.estimate import attention_share, estimate, speed_up, token_grid
from dit_accel.presets import list_presets, load_preset


@pytest.mark.parametrize("name", list_presets())
def test_every_preset_resolves_and_survives_export(name, tmp_path):
    preset = load_preset(name)
    exported = tmp_path / "exported.yaml"
    exported.write_text(preset.to_yaml())
    assert load_preset(exported) == preset
    assert estimate(preset).gain >= 1


def test_families_filter():
    assert "tiny-wan" in list_presets("wan")
    assert list_presets("none") == []


def test_a_variant_changes_method_and_schedule_only():
    base, dense = load_preset("wan2.1-t2v-14b-720p"), load_preset("wan2.1-t2v-14b-720p/dense")
    assert (base.method.name, dense.method.name) == ("radial", "dense")
    assert base.generation == dense.generation
    assert not dense.schedule.dense_steps


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("wan2.1-t2v-1.3b-480p", 32_760),
        ("wan2.1-t2v-14b-720p", 75_600),
        ("wan2.2-ti2v-5b-720p", 27_280),
        ("tiny-wan", 4_400),
    ],
)
def test_token_counts_of_published_sizes(name, tokens):
    preset = load_preset(name)
    frames, height, width = token_grid(preset.model, preset.generation)
    assert frames * height * width == tokens


@pytest.mark.parametrize(
    ("name", "tokens", "share"), [("wan2.1-t2v-14b-720p", 75_600, 0.718), ("wan2.1-t2v-1.3b-480p", 32_760, 0.699)]
)
def test_attention_share_of_published_models(name, tokens, share):
    assert attention_share(load_preset(name).model, tokens) == pytest.approx(share, abs=5e-3)


def test_amdahl():
    assert speed_up(0.718, 0.2, efficiency=1.0, overhead=0.0) == pytest.approx(2.35, abs=0.01)
    assert speed_up(0.5, 1.0, efficiency=1.0, overhead=0.0) == 1.0
    assert speed_up(0.5, 0.1, dense_share=1.0) == 1.0


def written(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


def test_a_file_extends_a_preset(tmp_path):
    preset = load_preset(
        written(tmp_path, "extends: tiny-wan\ngeneration: {num_inference_steps: 7}\nmethod: {parameters: {decay: 0.5}}")
    )
    assert preset.generation.num_inference_steps == 7
    assert preset.method.parameters["decay"] == 0.5
    assert preset.method.parameters["block"] == 64


def test_another_method_does_not_inherit_parameters(tmp_path):
    preset = load_preset(written(tmp_path, "extends: tiny-wan\nmethod: {name: dense}"))
    assert preset.method.parameters == {}


@pytest.mark.parametrize(
    ("text", "path", "message"),
    [
        ("extends: tiny-wan\nmethod: {parameters: {decay: .nan}}", "method.radial.decay", "finite"),
        ("extends: tiny-wan\nmethod: {parameters: {dencity: 0.2}}", "method.radial.dencity", "did you mean 'density'"),
        ("extends: tiny-wan\ngeneration: {num_framse: 9}", "generation.num_framse", "did you mean 'num_frames'"),
        ("extends: tiny-wan\ngeneration: {num_frames: true}", "generation.num_frames", "integer"),
        ("extends: tiny-wan\ngeneration: {guidance_scale: .nan}", "generation.guidance_scale", "finite"),
        ("extends: tiny-wan\ngeneration: {height: 81}", "height", "multiple of 16, got 81; 80 would do"),
        ("extends: tiny-wan\ngeneration: {num_frames: 20}", "num_frames", "1 plus a multiple of 2"),
        ("extends: tiny-wan\nschedule: {dense_steps: [[0, 4], [2, 6]]}", "schedule", "overlaps"),
        ("extends: tiny-wam", "preset", "did you mean 'tiny-wan'"),
        ("extends: [tiny-wan]", "extends", "expected the name of a preset"),
        ("extends: tiny-wan\nmethod: {name: radail}", "method", "did you mean 'radial'"),
        ("extends: tiny-wan\nextends: tiny-wan", "mine.yaml", "key given twice: extends"),
        ("a: [1", "mine.yaml", "not YAML: line"),
        ("- 1", "mine.yaml", "expected a mapping, got list"),
        ("!!python/object:os.system {}", "mine.yaml", "not YAML"),
    ],
)
def test_faults_name_the_place(tmp_path, text, path, message):
    with pytest.raises(ConfigError) as caught:
        load_preset(written(tmp_path, text))
    assert path in caught.value.path
    assert message in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"no such file: nowhere\.yaml"):
        load_preset("nowhere.yaml")
