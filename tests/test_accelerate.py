"""`accelerate()` on Wan: dense equals stock, it can be undone, and it never stacks."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel

import dit_accel
from dit_accel.errors import ConfigError, UnsupportedError

GRID = (3, 6, 5)  # 90 tokens: no multiple of any block


def tiny_transformer(seed: int = 0, image: bool = False) -> WanTransformer3DModel:
    torch.manual_seed(seed)
    extra = {"image_dim": 12, "added_kv_proj_dim": 32} if image else {}
    model = WanTransformer3DModel(
        patch_size=(1, 1, 1), num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        text_dim=8, freq_dim=16, ffn_dim=32, num_layers=3, rope_max_seq_len=32, **extra,
    )  # fmt: skip
    return model.eval()


def inputs(batch: int = 1, seed: int = 1, image: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = {
        "hidden_states": torch.randn(batch, 4, *GRID, generator=generator),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": torch.randn(batch, 512 if image else 7, 8, generator=generator),
    }
    if image:
        values["encoder_hidden_states_image"] = torch.randn(batch, 257, 12, generator=generator)
    return values


@torch.no_grad()
def run(model: WanTransformer3DModel, **values: torch.Tensor) -> torch.Tensor:
    return model(**values, return_dict=False)[0]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("fused", [False, True])
def test_dense_equals_stock_bit_for_bit(batch, fused):
    model = tiny_transformer()
    if fused:
        model.fuse_qkv_projections()
    stock = run(model, **inputs(batch))
    with dit_accel.accelerate(model, method="dense"):
        assert torch.equal(run(model, **inputs(batch)), stock)


def test_dense_equals_stock_with_image_tokens():
    model = tiny_transformer(image=True)
    stock = run(model, **inputs(image=True))
    with dit_accel.accelerate(model, method="dense"):
        assert torch.equal(run(model, **inputs(image=True)), stock)


def test_dense_equals_stock_with_lora():
    from peft import LoraConfig

    model = tiny_transformer()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    stock = run(model, **inputs())
    with dit_accel.accelerate(model, method="dense"):
        assert torch.equal(run(model, **inputs()), stock)


def test_dense_equals_stock_with_a_timestep_per_token():
    model = tiny_transformer()
    values = inputs() | {"timestep": torch.linspace(0, 900, 90).unsqueeze(0)}
    stock = run(model, **values)
    with dit_accel.accelerate(model, method="dense"):
        assert torch.equal(run(model, **values), stock)


def test_radial_at_full_density_equals_dense():
    model = tiny_transformer()
    stock = run(model, **inputs(2))
    with dit_accel.accelerate(model, method="radial", density=1.0, block=16, break_even=1.0) as acc:
        torch.testing.assert_close(run(model, **inputs(2)), stock, atol=1e-5, rtol=1e-5)
        assert {c.reason for c in acc.report().calls} == {None}


def test_a_sparse_method_changes_the_output_and_says_its_density():
    model = tiny_transformer()
    stock = run(model, **inputs())
    with dit_accel.accelerate(model, method="radial", variant="paper", sink=False, block=4, break_even=1.0) as acc:
        assert not torch.allclose(run(model, **inputs()), stock, atol=1e-4)
        report = acc.report()
    assert len(report.calls) == 3
    assert 0 < report.density < 1
    assert report.to_dict()["calls"][0]["backend"] == "torch"


def test_remove_restores_the_very_same_processors():
    model = tiny_transformer()
    before = dict(model.attn_processors)
    stock = run(model, **inputs())
    acc = dit_accel.accelerate(model, method="radial", decay=0.5)
    assert model.attn_processors != before
    acc.remove()
    acc.remove()
    after = model.attn_processors
    assert all(after[name] is before[name] for name in before)
    assert torch.equal(run(model, **inputs()), stock)


def test_a_second_accelerate_replaces_the_first():
    model = tiny_transformer()
    before = dict(model.attn_processors)
    first = dit_accel.accelerate(model, method="radial")
    second = dit_accel.accelerate(model, method="dense")
    assert not first.is_active
    run(model, **inputs())
    assert {c.method for c in second.report().calls} == {"dense"}
    assert not first.report().calls
    second.remove()
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_one_processor_serves_all_layers_and_carries_the_attributes_diffusers_looks_for():
    model = tiny_transformer()
    dit_accel.accelerate(model, method="radial")
    ours = {id(p): p for name, p in model.attn_processors.items() if "attn1" in name}
    assert len(ours) == 1
    processor = next(iter(ours.values()))
    assert processor._attention_backend is None
    assert processor._parallel_config is None
    model.set_attention_backend("native")
    assert processor._attention_backend is not None


def test_settings_of_the_stock_processors_are_taken_over():
    model = tiny_transformer()
    model.set_attention_backend("native")
    before = model.blocks[0].attn1.processor._attention_backend
    dit_accel.accelerate(model, method="radial")
    assert model.blocks[0].attn1.processor._attention_backend is before is not None


def test_a_foreign_processor_is_refused():
    model = tiny_transformer()

    class Foreign:
        pass

    model.blocks[1].attn1.processor = Foreign()
    with pytest.raises(UnsupportedError, match=r"blocks\.1\.attn1.*Foreign"):
        dit_accel.accelerate(model, method="dense")


def test_unknown_transformers_are_refused():
    with pytest.raises(UnsupportedError, match="no family for Linear"):
        dit_accel.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match="expected a pipeline"):
        dit_accel.accelerate(object())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "radail"}, "did you mean 'radial'"),
        ({"method": "radial", "density": float("nan")}, r"method\.radial\.density"),
        ({"method": "radial", "block": True}, r"method\.radial\.block.*integer"),
        ({"method": "radial", "dencity": 0.5}, "did you mean 'density'"),
        ({"method": "radial", "density": 1.5}, "less than or equal to 1"),
        ({"method": "radial", "dense_steps": True}, r"schedule\.dense_steps"),
        ({"method": "radial", "dense_steps": [[0, 5], [3, 8]]}, "overlaps"),
        ({"method": "radial", "refresh": 0}, r"schedule\.refresh"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_changed(arguments, message):
    model = tiny_transformer()
    before = dict(model.attn_processors)
    with pytest.raises(ConfigError, match=message):
        dit_accel.accelerate(model, **arguments)
    assert all(model.attn_processors[name] is before[name] for name in before)


def test_schedule_makes_calls_dense_and_says_why():
    model = tiny_transformer()
    acc = dit_accel.accelerate(
        model, method="radial", variant="paper", block=4, break_even=1.0, dense_layers=[[0, 1]], dense_steps=1
    )
    for step in range(2):
        with model.cache_context("cond", step_index=step, sigma=1 - step / 2, num_inference_steps=2):
            run(model, **inputs())
    reasons = [(c.step, c.layer, c.reason is None) for c in acc.report().calls]
    assert reasons == [(0, 0, False), (0, 1, False), (0, 2, False), (1, 0, False), (1, 1, True), (1, 2, True)]
    assert "layer 0" in acc.report().calls[0].reason
    assert "step 0" in acc.report().calls[1].reason


def test_min_tokens_and_break_even_are_reasons():
    model = tiny_transformer()
    with dit_accel.accelerate(model, method="radial", min_tokens=91) as acc:
        run(model, **inputs())
        assert acc.report().dense_reasons == {"90 tokens are fewer than min_tokens 91": 3}
    with dit_accel.accelerate(model, method="radial", density=1.0, block=16, break_even=0.5) as acc:
        run(model, **inputs())
        assert "above the break-even 0.50" in next(iter(acc.report().dense_reasons))


def test_overrides_change_parameters_per_layer():
    model = tiny_transformer()
    schedule = {"overrides": [{"layers": [[1, 2]], "parameters": {"density": 1.0}}]}
    with dit_accel.accelerate(
        model, method="radial", variant="paper", sink=False, block=4, break_even=1.0, schedule=schedule
    ) as acc:
        run(model, **inputs())
        densities = [c.density for c in acc.report().calls]
    assert densities[1] == 1.0
    assert densities[0] == densities[2] < 1.0


def test_batch_rows_are_independent():
    model = tiny_transformer()
    values = inputs(2)
    with dit_accel.accelerate(model, method="radial", variant="paper", block=8, break_even=1.0):
        both = run(model, **values)
        alone = run(model, **{name: value[1:] for name, value in values.items()})
    torch.testing.assert_close(both[1:], alone, atol=1e-5, rtol=1e-5)


def test_two_generations_equal_two_processes():
    model = tiny_transformer()

    def generate(transformer: WanTransformer3DModel) -> torch.Tensor:
        x = inputs()["hidden_states"]
        for step in range(3):
            for branch in ("cond", "uncond"):
                with transformer.cache_context(branch, step_index=step, sigma=1 - step / 3, num_inference_steps=3):
                    x = x - 0.1 * run(transformer, **(inputs() | {"hidden_states": x}))
        return x

    other = copy.deepcopy(model)
    acc = dit_accel.accelerate(model, method="radial", variant="paper", block=8, break_even=1.0, refresh=2)
    first, second = generate(model), generate(model)
    dit_accel.accelerate(other, method="radial", variant="paper", block=8, break_even=1.0, refresh=2)
    assert torch.equal(first, second)
    assert torch.equal(first, generate(other))
    assert len(acc.report().calls) == 3 * 2 * 3  # the latest generation only
