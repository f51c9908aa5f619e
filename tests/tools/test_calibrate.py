"""Calibration: what it measures, how it solves, that it resumes, and that the preset it writes runs."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace

import pytest
import torch
from calibration_cases import LAYOUT, METHODS, SIZES, small_plan

import dit_accel
from dit_accel.calibrate import alone
from dit_accel.calibrate import run as calibration
from dit_accel.calibrate.alone import DENSE, runs_of, times_beside_the_rest
from dit_accel.calibrate.assign import assign
from dit_accel.calibrate.observer import Observer, take_query_blocks
from dit_accel.calibrate.probe import only
from dit_accel.calibrate.run import measure
from dit_accel.calibrate.statistics import Statistics, layer_parts
from dit_accel.calibrate.write import head_table, write_preset
from dit_accel.cli import main
from dit_accel.engine import DenseCall
from dit_accel.errors import ConfigError
from dit_accel.kernels import block_attention
from dit_accel.methods.registry import get_method
from dit_accel.presets import Generation, load_preset
from dit_accel.report.records import CallRecord
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState


def tensors(heads=3, dim=8, layout=LAYOUT, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(2, heads, layout.tokens, dim, generator=generator) for _ in range(3))


def dense_call(layer=0, step=0, seed=0):
    q, k, v = tensors(seed=seed)
    real = torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=real[:, None, None, :])
    return DenseCall("transformer", layer, RunState(LAYOUT.grid, step, 0.5), LAYOUT, q, k, v, out)


@pytest.mark.parametrize("name", ["tiles", "windows", "bands"])
def test_some_query_blocks_give_the_rows_of_all(name):
    method, (q, k, v) = METHODS[name], tensors()
    order, plan = method.plan(LAYOUT, q, k)
    q, k, v = (q, k, v) if order is None else order.apply(q, k, v)
    kv_len = torch.tensor(LAYOUT.valid)
    whole = block_attention(q, k, v, plan, remainder=method.remainder, kv_len=kv_len)
    blocks = torch.tensor([0, 2, plan.q_blocks.count - 1])
    part, tokens = take_query_blocks(plan, blocks)
    rows = block_attention(q[:, :, tokens], k, v, part.validate(), remainder=method.remainder, kv_len=kv_len)
    torch.testing.assert_close(rows, whole[:, :, tokens])
    assert len(tokens) == int(plan.q_blocks.lengths[blocks].sum())


def true_errors(seen):
    """Squared error per head of each method, relative to the squared output of all heads, over the valid rows."""
    real = torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1)
    errors = []
    for method in METHODS.values():
        order, plan = method.plan(LAYOUT, seen.q, seen.k)
        qkv = (seen.q, seen.k, seen.v) if order is None else order.apply(seen.q, seen.k, seen.v)
        out = block_attention(*qkv, plan, remainder=method.remainder, kv_len=torch.tensor(LAYOUT.valid))
        out = out if order is None else order.restore(out)
        wrong = ((out - seen.out).square().sum(-1) * real[:, None]).sum((0, 2))
        errors.append(wrong / (seen.out.square().sum(-1) * real[:, None]).sum())
    return torch.stack(errors, -1)


def test_the_sums_are_the_true_errors_and_densities():
    statistics = Statistics.empty(2, 3, len(METHODS))
    observer = Observer(list(METHODS.values()), Schedule(), statistics)
    first, second = dense_call(1, seed=0), dense_call(1, step=1, seed=1)
    observer(first)
    observer(second)
    expected = (true_errors(first) + true_errors(second)) / 2
    torch.testing.assert_close(statistics.mean_error()[0, 1].float(), expected, rtol=1e-4, atol=1e-9)
    assert statistics.calls.tolist() == [[0, 2]]
    assert statistics.mean_density()[0, 1, :, 3].tolist() == [1.0] * 3
    assert statistics.mean_error()[0, 1, :, 3].max() < 1e-9


def test_a_method_that_works_on_after_the_kernel_gets_all_rows():
    seen, method = dense_call(), get_method("composed", density=0.3, tile=(2, 3, 3), remainder="drop")

    class Halved(type(method)):
        @property
        def completes(self):
            return True

        def complete(self, part):
            assert part.out.shape[2] == seen.q.shape[2]
            part.call.extra_density += 0.125
            return part.out / 2

    halved = Halved(**method.model_dump(exclude_unset=True))
    statistics = Statistics.empty(1, 3, 1)
    Observer([halved], Schedule(), statistics, share=0.2)(seen)
    order, plan = method.plan(LAYOUT, seen.q, seen.k)
    out = order.restore(halved.compute(*order.apply(seen.q, seen.k, seen.v), plan, CallContext(LAYOUT)))
    real = (torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1))[:, None]
    expected = ((out - seen.out).square().sum(-1) * real).sum((0, 2)) / (seen.out.square().sum(-1) * real).sum()
    torch.testing.assert_close(statistics.mean_error()[0, 0, :, 0].float(), expected, rtol=1e-4, atol=1e-9)
    assert float(statistics.mean_density().mean()) == pytest.approx(plan.density + 0.125, abs=1e-6)


def test_a_share_of_the_blocks_gives_the_error_on_average():
    seen = dense_call()
    statistics = Statistics.empty(1, 3, len(METHODS))
    observer = Observer(list(METHODS.values()), Schedule(), statistics, share=0.3, seed=1)
    for _ in range(60):
        observer(seen)
    torch.testing.assert_close(statistics.mean_error()[0, 0].float(), true_errors(seen), rtol=0.15, atol=1e-6)


def test_calls_that_stay_dense_and_steps_between_are_left_out():
    statistics = Statistics.empty(3, 3, 1)
    schedule = Schedule.make(dense_steps=1, dense_layers=1)
    observer = Observer([METHODS["bands"]], schedule, statistics, every=2)
    for layer, step in itertools.product(range(3), range(5)):
        observer(dense_call(layer, step))
    assert statistics.calls.tolist() == [[0, 2, 2]]


def test_a_killed_calibration_goes_on_and_gives_the_same(tmp_path, monkeypatch):
    plan, pipe = small_plan(share=0.5), random_wan_pipeline()
    whole = measure(pipe, plan, tmp_path / "whole.safetensors", lambda line: None)
    told = []
    real = calibration.call_pipeline

    def killed(pipe, generation, prompt, seed, inputs):
        if prompt == plan.prompts[1]:
            raise KeyboardInterrupt
        return real(pipe, generation, prompt, seed, inputs)

    monkeypatch.setattr(calibration, "call_pipeline", killed)
    path = tmp_path / "killed.safetensors"
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, plan, path, told.append)
    assert Statistics.load(path, plan.settings() | {"prompts": list(plan.prompts)}).done == [0]
    monkeypatch.setattr(calibration, "call_pipeline", real)
    told.clear()
    resumed = measure(pipe, plan, path, told.append)
    assert "prompt 2 of 2" in told[0]
    assert "left" in told[0]
    assert resumed.done == whole.done == [0, 1]
    assert torch.equal(resumed.error, whole.error)
    assert torch.equal(resumed.density, whole.density)
    told.clear()
    measure(None, plan, path, told.append)  # all is there: the pipeline is not even looked at
    assert len(told) == 1


def test_statistics_of_another_calibration_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    Statistics.empty(1, 1, 1).save(path, small_plan().settings())
    with pytest.raises(ConfigError, match="differs in share"):
        measure(None, small_plan(share=0.5), path, lambda line: None)
    with pytest.raises(ConfigError, match="differs in inputs"):
        measure(None, small_plan(inputs={"image": "abc"}), path, lambda line: None)
    plan = small_plan()
    two = replace(plan, preset=plan.preset.model_copy(update={"schedule_2": Schedule.make(dense_steps=1)}))
    with pytest.raises(ConfigError, match="differs in schedule_2"):
        measure(None, two, path, lambda line: None)
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="cannot be read"):
        measure(None, small_plan(), path, lambda line: None)


def test_parts_of_layers_and_schedules_of_probes():
    assert layer_parts(5, 2) == [slice(0, 2), slice(2, 5)]
    assert layer_parts(2, 4) == [slice(0, 1), slice(1, 2)]
    assert layer_parts(3, 0) == []
    schedule = Schedule.make(dense_steps=[[0, 2]], dense_layers=[[4, 5]], layer_groups=[[0, 2]])
    probe = only(schedule, 8, range(1, 5), 6, slice(2, 6))
    sparse = {(n, s) for n in range(6) for s in range(8) if probe.dense_reason(n, s, 0.5, 99) is None}
    assert sparse == set(itertools.product([2, 3, 5], [2, 3, 4]))
    assert probe.layer_groups == ()


def test_ranges_of_steps_part_those_that_are_not_dense():
    plan = small_plan(ranges=3, generation=Generation(**SIZES | {"num_inference_steps": 9}))
    assert [list(plan.steps_of(at)) for at in range(3)] == [[0, 1, 2, 3], [4, 5], [6, 7, 8]]  # step 1 is dense
    assert plan.starts == (4, 6)
    with pytest.raises(ConfigError, match="--step-ranges"):
        _ = small_plan(ranges=3).starts


def call_of(step, layer, order=0.0, select=0.0, attend=0.0):
    record = CallRecord("transformer", layer, step, "cond", 0, "dense", None)
    record._marks = {"order": [order], "select": [select], "attend": [attend]}
    return record


def test_times_are_those_of_the_measured_calls_beside_the_rest_of_their_step():
    # The machine is half as fast in the last step; the first is dense, and so is layer 1.
    calls = [call_of(0, 0, attend=900.0), call_of(1, 0, 10.0, 20.0, 70.0), call_of(1, 1, attend=400.0)]
    calls += [call_of(2, 0, 20.0, 40.0, 140.0), call_of(2, 1, attend=800.0)]
    whole, order = times_beside_the_rest(calls, [1.5, 1.5, 3.0], {(1, 0), (2, 0)})
    assert (whole, order) == (pytest.approx(0.09), pytest.approx(0.01))


def test_every_candidate_runs_alone_and_a_killed_calibration_goes_on(tmp_path, monkeypatch):
    methods = {"few": get_method("composed", tile=(2, 3, 3), density=0.3), "bands": METHODS["bands"]}
    methods |= {"more": get_method("composed", tile=(2, 3, 3), density=0.6), "dense": METHODS["dense"]}
    plan, pipe, path = small_plan(candidates=methods, alone=True), random_wan_pipeline(), tmp_path / "s.safetensors"
    assert plan.kinds == (0, 1, 0, 3)
    runs = [(run.candidate, run.mixed) for run in runs_of(plan, plan.kinds) if run.prompt == 0]
    assert runs == [(DENSE, False), (0, False), (1, False), (2, False), (0, True), (1, True)]
    made, real = [], alone._generate

    def counted(pipe, plan, held, run, inputs):
        made.append(run)
        if len(made) == 8:
            raise KeyboardInterrupt
        return real(pipe, plan, held, run, inputs)

    monkeypatch.setattr(alone, "_generate", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(pipe, plan, path, lambda line: None)
    found = measure(pipe, plan, path, lambda line: None)
    assert [run.prompt for run in made] == [0] * 6 + [1] * 2 + [1] * 6
    assert found.alone == [0, 1]
    assert (found.time[:, 0] > 0).all()
    assert found.time[:, 0, 3].tolist() == [1.0, 1.0]
    assert (found.time[:, 1, [0, 2]] > 0).all()  # tiles are put in order
    assert (found.time[:, 1, 3] == 0).all()
    assert (found.time[:, 2, :2] > 0).all()
    assert found.alone_change[:, 3].tolist() == [0.0, 0.0]
    assert (found.alone_change[:, 0] > 0).all()
    assert found.alone_change[:, 2].tolist() == [0.0, 0.0]  # above the break-even, it ran dense
    again = Statistics.load(path, plan.settings())
    assert torch.equal(again.time, found.time)
    assert (again.kinds, again.alone) == (plan.kinds, [0, 1])


def test_branches_share_what_the_method_shares():
    """The second branch errs as it does under the choice of the first."""
    method = get_method("aurora", block=16, query_block=32, clusters=4, density=0.3)
    statistics = Statistics.empty(1, 3, 1)
    observer, call = Observer([method], Schedule(), statistics), CallContext(LAYOUT)
    observer(dense_call(seed=0))
    one = statistics.error.clone()
    second = dense_call(seed=1)
    second = replace(second, state=replace(second.state, branch="uncond"))
    observer(second)
    q, k, v = tensors(seed=0)
    method.plan(LAYOUT, q, k, v, call)
    q, k, v = second.q, second.k, second.v
    other = CallContext(LAYOUT, branch="uncond", branches=call.branches)
    order, plan = method.plan(LAYOUT, q, k, v, other)
    out = order.restore(method.compute(*order.apply(q, k, v), plan, other))
    real = (torch.arange(LAYOUT.tokens) < torch.tensor(LAYOUT.valid).unsqueeze(-1))[:, None]
    expected = ((out - second.out).square().sum(-1) * real).sum((0, 2)) / (second.out.square().sum(-1) * real).sum()
    torch.testing.assert_close((statistics.error - one)[0, 0, :, 0].float(), expected, rtol=1e-4, atol=1e-9)


def test_the_preset_runs_and_keeps_the_predicted_density(tmp_path):
    plan, pipe = small_plan(share=1.0), random_wan_pipeline()
    sums = measure(pipe, plan, tmp_path / "s.safetensors", lambda line: None)
    lowest, highest = float(sums.mean_density().amin(-1).mean()), float(sums.mean_density().amax(-1).mean())
    found = assign(sums, max_density=(lowest + highest) / 2)
    write_preset(tmp_path / "mine.yaml", plan, found, sums)
    preset = load_preset(tmp_path / "mine.yaml")
    assert preset.schedule.head_table == head_table(found, plan.candidates)
    assert preset.generation == plan.generation
    assert preset.schedule.dense_steps == ((1, 2),)
    assert "2 prompts" in preset.source
    assert "&" not in (tmp_path / "mine.yaml").read_text()
    pipe.set_progress_bar_config(disable=True)
    sizes = {key: value for key, value in SIZES.items() if key != "fps"}
    with dit_accel.accelerate(pipe, preset, break_even=1.0, dense_steps=0) as acceleration:
        pipe(prompt="x", **sizes, output_type="latent", generator=torch.Generator().manual_seed(1000))
        report = acceleration.report()
    assert {call.reason for call in report.calls} == {None}
    assert report.density == pytest.approx(found.cost, abs=0.02)


def test_a_preset_that_cannot_be_written_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("dit_accel.models.load_pipeline", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    (tmp_path / "folder.yaml").mkdir()
    for name, message in (("file/mine.yaml", "--output: cannot make"), ("folder.yaml", "--output: ")):
        arguments = ["--density", "0.5", "--output", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["dit-accel", "calibrate", *arguments])
        with pytest.raises(SystemExit) as left:
            main.main()
        assert left.value.code == 2
        assert message in capsys.readouterr().err


def test_the_command_measures_once_and_solves_again(pipeline_folder, tmp_path, monkeypatch, capsys):
    base = tmp_path / "small.yaml"
    base.write_text(
        "extends: tiny-wan/composed\nschedule: {dense_steps: 0}\n"
        "generation: {height: 32, width: 32, num_frames: 5, num_inference_steps: 1}\n"
    )
    target = tmp_path / "mine.yaml"
    fixed = ["--preset", base, "--model", pipeline_folder, "--num-prompts", 1, "--output", target]
    fixed += ["--candidates", "composed:density=0.3,tile=[2,3,3]", "--candidates", "dense"]

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["dit-accel", "calibrate", *map(str, [*fixed, *arguments])])
        with pytest.raises(SystemExit) as left:
            main.main()
        captured = capsys.readouterr()
        return left.value.code or 0, captured.out, " ".join(captured.err.split())

    code, out, err = call("--max-error", 0)
    assert code == 0, err
    assert "prompt 1 of 1" in err
    assert "predicted error 0.0000 at density 1.000" in out
    code, out, err = call("--density", 0.9)
    assert code == 0, err
    assert "prompt 1 of 1" not in err
    assert load_preset(target).schedule.head_table is not None
    assert call()[0] == 2
    assert call("--max-error", 0.1, "--density", 0.5)[0] == 2
    assert "at least" in call("--density", 0.01)[2]
