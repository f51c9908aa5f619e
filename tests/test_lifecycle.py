"""What users do to a model around `accelerate()`: offload, copy, compile, drop, fail; nothing may go wrong unseen."""

from __future__ import annotations

import copy
import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload_with_hook
from accelerate.hooks import remove_hook_from_module
from test_accelerate import GRID, inputs, run, tiny_transformer

import dit_accel
from dit_accel.engine import Engine
from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.handle import handle_of
from dit_accel.samples.tiny_random import tiny_arguments, tiny_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import RunState

SPARSE = {"method": "radial", "variant": "paper", "block": 8, "break_even": 1.0}
TILES = {"method": "sliding_tile", "tile": (1, 3, 2), "window": (3, 1, 1), "break_even": 1.0}
CPU = torch.device("cpu")


def generate(model, steps: int = 3) -> torch.Tensor:
    x = inputs()["hidden_states"]
    for step in range(steps):
        with model.cache_context("cond", step_index=step, sigma=1 - step / steps, num_inference_steps=steps):
            x = x - 0.1 * run(model, **(inputs() | {"hidden_states": x}))
    model._reset_stateful_cache()
    return x


def end_of_a_pipeline_call(model) -> None:
    """What `maybe_free_model_hooks` does under `enable_model_cpu_offload`."""
    remove_hook_from_module(model, recurse=True)
    cpu_offload_with_hook(model, execution_device=CPU)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("settings", [SPARSE, TILES])
def test_every_generation_under_model_offload_is_followed(first, settings):
    model, plain = tiny_transformer(), tiny_transformer()
    dit_accel.accelerate(plain, **settings, dense_steps=1)
    expected, stock = generate(plain), generate(tiny_transformer())
    if first:
        cpu_offload_with_hook(model, execution_device=CPU)
    acceleration = dit_accel.accelerate(model, **settings, dense_steps=1)
    for generation in range(3):
        assert torch.equal(generate(model), expected)
        calls = acceleration.report().calls
        assert {(call.generation, call.step) for call in calls} == {(generation, step) for step in range(3)}
        assert len(calls) == 3 * 3
        end_of_a_pipeline_call(model)
    offloading = model.forward
    acceleration.remove()
    assert model.forward is offloading
    assert torch.equal(generate(model), stock)
    end_of_a_pipeline_call(model)
    assert torch.equal(generate(model), stock)


def test_a_model_that_nobody_holds_is_freed():
    model = tiny_transformer()
    dit_accel.accelerate(model, **TILES)
    generate(model)
    seen = weakref.ref(model)
    del model
    gc.collect()
    assert seen() is None


@pytest.mark.parametrize("settings", [SPARSE, TILES, SPARSE | {"max_error": 0.5}])
def test_a_copy_is_accelerated_by_itself(settings):
    model = tiny_transformer()
    acceleration = dit_accel.accelerate(model, **settings)
    expected = generate(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    calls = len(acceleration.report().calls)
    assert torch.equal(generate(copied), expected)
    assert len(acceleration.report().calls) == calls
    again = dit_accel.accelerate(copied, method="dense")
    assert acceleration.is_active
    again.remove()
    assert torch.equal(generate(copied), generate(tiny_transformer()))


def two_experts(**settings):
    pipe = SimpleNamespace(transformer=tiny_transformer(), transformer_2=tiny_transformer())
    return pipe, dit_accel.accelerate(pipe, **settings)


@pytest.mark.parametrize("settings", [SPARSE, TILES])
def test_a_copy_of_one_of_two_transformers_leaves_the_other_alone(settings):
    pipe, acceleration = two_experts(**settings)
    expected, memo = generate(pipe.transformer_2), {}
    copied = copy.deepcopy(pipe.transformer_2, memo)
    assert id(pipe.transformer) not in memo
    own = handle_of(copied)
    assert [*own.engines] == ["transformer_2"]
    assert [*own.engines["transformer_2"].siblings] == [own.engines["transformer_2"]]
    assert torch.equal(generate(copied), expected)
    own.remove()
    assert acceleration.is_active
    assert torch.equal(generate(copied), generate(tiny_transformer()))
    assert torch.equal(generate(pipe.transformer_2), expected)


@pytest.mark.parametrize("what", ["pipeline", "handle"])
def test_a_copy_of_both_transformers_is_one_run_of_its_own(what):
    pipe, acceleration = two_experts(**SPARSE)
    if what == "handle":
        own = copy.deepcopy(acceleration)
        models = [part.model for part in own._installed.values()]
    else:
        copied = copy.deepcopy(pipe)
        models, own = [copied.transformer, copied.transformer_2], handle_of(copied.transformer)
    assert own is handle_of(models[0]) is handle_of(models[1])
    assert own is not acceleration
    high, low = own.engines.values()
    assert [*high.siblings] == [*low.siblings] == [high, low]
    for model, name in zip(models, ("transformer", "transformer_2"), strict=True):
        assert model is not getattr(pipe, name)
        run(model, **(inputs() | {"timestep": torch.tensor([900.0 if name == "transformer" else 100.0])}))
    assert {(call.component, call.step) for call in own.report().calls} == {("transformer", 0), ("transformer_2", 1)}
    assert not acceleration.report().calls


@pytest.mark.parametrize("wrap", [False, True])
def test_a_compiled_model_is_accelerated_as_the_model_in_it(wrap):
    torch.compiler.reset()
    model, plain = tiny_transformer(), tiny_transformer()
    dit_accel.accelerate(plain, **SPARSE)
    compiled = torch.compile(model, backend="eager")
    stock = run(compiled, **inputs())
    first = dit_accel.accelerate(model, **SPARSE)
    acceleration = dit_accel.accelerate(compiled if wrap else model, **SPARSE)
    assert not first.is_active
    torch.testing.assert_close(generate(compiled), generate(plain), atol=1e-5, rtol=1e-5)
    assert len(acceleration.report().calls) == 3 * 3
    acceleration.remove()
    torch.testing.assert_close(run(compiled, **inputs()), stock, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()


WRONG = {"overrides": [{"layers": 1, "parameters": {"nonsense": 3}}]}


@pytest.mark.parametrize(
    "settings",
    [
        {"method": dit_accel.get_method("radial"), "schedule": WRONG},
        {"method": "radial", "schedule_2": WRONG},
        {"method": "radial", "schedule": WRONG},
    ],
)
def test_a_refused_call_leaves_the_one_before_in_place(settings):
    pipe = SimpleNamespace(transformer=tiny_transformer(), transformer_2=tiny_transformer())
    acceleration = dit_accel.accelerate(pipe, **SPARSE)
    with pytest.raises(ConfigError, match="nonsense"):
        dit_accel.accelerate(pipe, **settings)
    assert acceleration.is_active


def test_parameters_for_another_number_of_heads_leave_the_one_before_in_place():
    model = tiny_transformer()
    acceleration = dit_accel.accelerate(model, **SPARSE)
    with pytest.raises(ConfigError, match="threshold"):
        dit_accel.accelerate(model, method="xattention", threshold=[0.9, 0.8, 0.7])
    assert acceleration.is_active


def test_after_a_reset_the_next_pass_is_the_first_of_a_run():
    model = tiny_transformer()
    with dit_accel.accelerate(model, method="radial", dense_steps=1, break_even=1.0) as acceleration:
        for time in (900.0, 500.0):
            run(model, **inputs() | {"timestep": torch.tensor([time])})
            acceleration.reset()
            calls = acceleration.report().calls
            assert {call.step for call in calls} == {0}
            assert len(calls) == 3


def test_a_foreign_processor_in_one_of_two_transformers_leaves_both_as_they_were():
    pipe = SimpleNamespace(transformer=tiny_transformer(), transformer_2=tiny_transformer())
    pipe.transformer_2.blocks[2].attn1.processor = SimpleNamespace()
    before = [block.attn1.processor for block in pipe.transformer.blocks]
    with pytest.raises(UnsupportedError, match=r"blocks\.2\.attn1"):
        dit_accel.accelerate(pipe, **SPARSE)
    assert [block.attn1.processor for block in pipe.transformer.blocks] == before
    assert not pipe.transformer._forward_pre_hooks


def test_a_preset_that_cannot_be_installed_leaves_nothing_on(monkeypatch):
    pipe = tiny_pipeline("wan2.1-t2v")
    preset = dit_accel.load_preset("wan2.1-t2v-1.3b-480p")
    extras = {"cache": {"name": "first_block", "parameters": {"threshold": 0.1}}, "compile": {"backend": "eager"}}
    preset = preset.model_copy(update={"extras": type(preset.extras)(**extras)})

    def fail(*_):
        raise MemoryError

    for place in ("dit_accel.acceleration.track", "dit_accel.extras.install._compile"):
        with monkeypatch.context() as patched:
            patched.setattr(place, fail)
            with pytest.raises(MemoryError):
                dit_accel.accelerate(pipe, preset)
        assert not pipe.transformer.is_cache_enabled
        assert {type(block.attn1.processor).__name__ for block in pipe.transformer.blocks} == {"WanAttnProcessor"}
        assert {block._compiled_call_impl for block in pipe.transformer.blocks} == {None}


def test_a_report_holds_one_run_of_two_experts():
    """A run that only the first expert does says nothing of what the second did in the run before."""
    pipe = SimpleNamespace(transformer=tiny_transformer(), transformer_2=tiny_transformer())
    acceleration = dit_accel.accelerate(pipe, **SPARSE)

    def steps(*experts: str) -> list[tuple[str, int]]:
        for step, name in enumerate(experts):
            model = getattr(pipe, name)
            with model.cache_context("cond", step_index=step, sigma=1 - step / 3, num_inference_steps=len(experts)):
                run(model, **inputs())
        return sorted({(call.component, call.step) for call in acceleration.report().calls})

    assert steps("transformer", "transformer_2") == [("transformer", 0), ("transformer_2", 1)]
    assert steps("transformer", "transformer") == [("transformer", 0), ("transformer", 1)]
    assert steps("transformer_2", "transformer_2") == [("transformer_2", 0), ("transformer_2", 1)]
    assert {shot.component for shot in acceleration.report().pictures} == {"transformer_2"}


def test_padding_without_text_gets_no_weight():
    """A mask that says a length may pad the video itself."""
    module = torch.nn.Identity()
    engine = Engine(dit_accel.get_method("radial", variant="paper", block=8), Schedule(), [module], break_even=1.0)
    engine.begin(RunState(GRID, 0, 1.0))
    q, k, v = torch.randn(3, 1, 90, 2, 8, generator=torch.Generator().manual_seed(0))
    k[:, 70:] = v[:, 70:] = torch.nan
    out = engine.attend(module, q, k, v, dense=lambda: q, valid=(70,))
    assert engine.calls[0].reason is None
    assert out[:, :70].isfinite().all()


def test_settings_made_under_acceleration_outlive_it():
    model = tiny_transformer()
    acceleration = dit_accel.accelerate(model, **SPARSE)
    for block in model.blocks:
        block.attn1.processor._attention_backend = "_native_math"
    acceleration.remove()
    assert {block.attn1.processor._attention_backend for block in model.blocks} == {"_native_math"}


def test_a_processor_kept_from_a_removed_acceleration_says_so():
    model = tiny_transformer()
    acceleration = dit_accel.accelerate(model, **SPARSE)
    ours = model.blocks[0].attn1.processor
    generate(model)
    acceleration.remove()
    model.blocks[0].attn1.processor = ours
    with pytest.raises(RuntimeError, match="outside the transformer's forward pass"):
        run(model, **inputs())


def test_a_callback_that_raises_leaves_no_trace():
    def stop(*_):
        raise KeyboardInterrupt

    pipe = tiny_pipeline("wan2.1-t2v")
    arguments = tiny_arguments("wan2.1-t2v") | {"output_type": "latent"}
    acceleration = dit_accel.accelerate(pipe, method="radial", block=8, break_even=1.0, refresh=9)

    def latents(**more):
        return pipe(**(arguments | {"generator": torch.Generator().manual_seed(3)} | more)).frames

    first, calls = latents(), len(acceleration.report().calls)
    with pytest.raises(KeyboardInterrupt):
        latents(callback_on_step_end=stop)
    assert torch.equal(latents(), first)
    assert len(acceleration.report().calls) == calls
