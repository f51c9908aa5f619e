"""Every published layout, made from tiny random weights, loads strictly and gives the same model."""

from __future__ import annotations

import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from stream_cases import latents, text, tiny_transformer

from dit_accel.errors import ConfigError
from dit_accel.pipelines.streaming.checkpoints import (
    CAUSAL_WEIGHTS,
    convert_to_safetensors,
    load_causal_weights,
    merge_lora,
)
from dit_accel.streaming import STREAM_PRESETS

# From Diffusers' names to those of the original code, as the original code defines its modules.
NAMES = [
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
    ("proj_out", "head.head"),
]


def original(key):
    parts = key.split(".")
    if key == "scale_shift_table":
        return "head.modulation"
    if parts[0] == "blocks" and parts[2] in ("norm2", "norm3"):
        parts[2] = {"norm2": "norm3", "norm3": "norm2"}[parts[2]]
    key = ".".join(parts).replace("scale_shift_table", "modulation")
    for ours, theirs in NAMES:
        key = f".{key}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return key


@pytest.fixture(scope="module")
def source():
    return tiny_transformer(seed=1)


def weights_of(model):
    return {original(key): value.clone() for key, value in model.state_dict().items()}


def prefixed(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def layouts(model):
    weights = weights_of(model)
    old = {key: torch.zeros_like(value) for key, value in weights.items()}
    wrapped = {
        f"model._fsdp_wrapped_module.{key.replace('self_attn', '_fsdp_wrapped_module.self_attn')}": value
        for key, value in weights.items()
    }
    return {
        "self-forcing": {"generator": prefixed(old, "model."), "generator_ema": prefixed(weights, "model.")},
        "causvid": {"generator": prefixed(weights, "model.")},
        "rolling-forcing": {"generator": prefixed(old, "model."), "generator_ema": wrapped},
        "causal-forcing": {"generator": prefixed(weights, "model."), "step": 1000},
        "reward-forcing": {"generator_ema": prefixed(weights, "model.")},
        "krea": prefixed(weights, "model."),
        "diffusers": dict(model.state_dict()),
    }


def output(model):
    with torch.no_grad():
        return model(latents(3), torch.tensor([400.0]), text(), return_dict=False)[0]


@pytest.mark.parametrize("name", sorted(layouts(tiny_transformer(layers=1))))
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_every_layout_loads_strictly(source, tmp_path, name, suffix):
    stored, path = layouts(source)[name], tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        inner = stored.get("generator_ema") or stored.get("generator") or stored
        save_file({key: value.contiguous() for key, value in inner.items()}, path)
    else:
        torch.save(stored, path)
    model = tiny_transformer(seed=2)
    load_causal_weights(model, path)
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in model.state_dict().items())
    assert torch.equal(output(model), output(source))


def make_lora(model, rank=2, prefix="base_model.model."):
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    for key, value in weights_of(model).items():
        if "attn" in key and value.ndim == 2:
            layer = key.removesuffix(".weight")
            pairs[f"{prefix}{layer}.lora_A.weight"] = torch.randn(rank, value.shape[1], generator=generator)
            pairs[f"{prefix}{layer}.lora_B.weight"] = torch.randn(value.shape[0], rank, generator=generator)
    return pairs


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1.0, 0.5)])
@pytest.mark.parametrize("middle", [".", ".default."])
def test_longlive_base_and_lora(source, tmp_path, alpha, scale, middle):
    lora = {key.replace(".weight", f"{middle}weight"): x for key, x in make_lora(source).items()}
    torch.save({"generator": prefixed(weights_of(source), "model.")}, tmp_path / "base.pt")
    torch.save({"generator_lora": lora}, tmp_path / "lora.pt")
    model = tiny_transformer(seed=2)
    load_causal_weights(model, tmp_path / "base.pt", tmp_path / "lora.pt", alpha)
    generator = make_lora(source)
    for index, block in enumerate(model.blocks):
        for module, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            for ours, short in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o")):
                name = f"base_model.model.blocks.{index}.{theirs}.{short}"
                delta = generator[f"{name}.lora_B.weight"] @ generator[f"{name}.lora_A.weight"]
                base = source.get_submodule(f"blocks.{index}.{module}.{ours}").weight
                torch.testing.assert_close(block.get_submodule(f"{module}.{ours}").weight, base + scale * delta)
        assert torch.equal(block.ffn.net[2].weight, source.blocks[index].ffn.net[2].weight)


def test_lora_equals_peft(source):
    peft = pytest.importorskip("peft")
    model = tiny_transformer(seed=1)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config)
    lora = {key: x.clone() for key, x in peft.get_peft_model_state_dict(wrapped).items()}
    merged = merge_lora(source.state_dict(), lora, alpha=4)
    expected = wrapped.merge_and_unload().state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value)


def test_conversion_to_safetensors(source, tmp_path):
    torch.save(layouts(source)["self-forcing"], tmp_path / "a.pt")
    torch.save({"generator_lora": make_lora(source)}, tmp_path / "lora.pt")
    plain = load_file(convert_to_safetensors(tmp_path / "a.pt", tmp_path / "plain.safetensors"))
    assert all(torch.equal(x, source.state_dict()[key]) for key, x in plain.items())
    merged = convert_to_safetensors(tmp_path / "a.pt", tmp_path / "merged.safetensors", tmp_path / "lora.pt")
    models = tiny_transformer(seed=2), tiny_transformer(seed=2)
    load_causal_weights(models[0], merged)
    load_causal_weights(models[1], tmp_path / "a.pt", tmp_path / "lora.pt")
    assert torch.equal(output(models[0]), output(models[1]))


def test_what_does_not_fit_is_refused(source, tmp_path):
    weights, path = weights_of(source), tmp_path / "a.pt"

    def load(stored, model=None):
        torch.save(stored, path)
        load_causal_weights(model or tiny_transformer(seed=2), path)

    with pytest.raises(ConfigError, match=r"missing \['blocks.0.attn1.to_q.weight'\]"):
        load({k: x for k, x in weights.items() if k != "blocks.0.self_attn.q.weight"})
    with pytest.raises(ConfigError, match=r"left over \['extra'\]"):
        load({**weights, "extra": torch.zeros(1)})
    with pytest.raises(ConfigError, match="the same size of model"):
        load(weights, tiny_transformer(head_dim=12))
    with pytest.raises(ConfigError, match=r"missing.*blocks.2"):
        load(weights, tiny_transformer(layers=3))
    with pytest.raises(ConfigError, match="expected weights"):
        load({"optimizer": {"step": 1}})
    with pytest.raises(ConfigError, match="the same name"):
        load({**weights, "model.head.modulation": weights["head.modulation"]})
    with pytest.raises(ConfigError, match="no such file"):
        load_causal_weights(source, tmp_path / "none.pt")


def test_a_file_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    (tmp_path / "evil.pt").write_bytes(pickle.dumps({"generator": Evil()}))
    with pytest.raises(ConfigError, match="weights alone"):
        load_causal_weights(tiny_transformer(layers=1), tmp_path / "evil.pt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lora: lora.pop("base_model.model.blocks.0.self_attn.q.lora_B.weight"), "pairs of lora_A and lora_B"),
        (lambda lora: lora.update({k.replace("blocks.0", "blocks.9"): x for k, x in lora.items()}), "no such layer"),
        (lambda lora: lora.clear(), "pairs of lora_A"),
    ],
)
def test_a_lora_that_does_not_fit_is_refused(source, change, message):
    lora = make_lora(source)
    change(lora)
    with pytest.raises(ConfigError, match=message):
        merge_lora(weights_of(source), lora)


def test_every_published_weight_names_settings_that_exist():
    assert all(weights.stream in STREAM_PRESETS for weights in CAUSAL_WEIGHTS.values())
