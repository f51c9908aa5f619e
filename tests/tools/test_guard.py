"""The guard: its estimate is calibrated, it densifies when it must, and it relaxes when it may."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import dit_accel
from dit_accel.engine import Engine
from dit_accel.error_estimate import CONFIDENCE, estimate_error, rows_to_check, sample_rows
from dit_accel.errors import ConfigError
from dit_accel.guard import Guard, hash_seed
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

LAYOUT = TokenLayout((15, 17, 16))  # 4080 tokens: no multiple of a block


def smooth(generator, heads, tokens, dim, sharpness):
    """Rows that resemble their neighbours, as in a video; `sharpness` scales the logits."""
    steps = torch.randn(2, heads, tokens, dim, generator=generator).cumsum(2)
    return sharpness * F.normalize(steps - steps.mean(2, keepdim=True), dim=-1) * dim**0.5


def heavy(generator, heads, tokens, dim, sharpness):
    """A few rows many times larger than the others."""
    size = torch.randn(2, heads, tokens, 1, generator=generator).abs() ** 3
    return sharpness * size * torch.randn(2, heads, tokens, dim, generator=generator)


def plain(generator, heads, tokens, dim, sharpness):
    return sharpness * torch.randn(2, heads, tokens, dim, generator=generator)


def true_error(out, exact):
    return float((out - exact).norm() / exact.norm())


@pytest.mark.parametrize("make", [plain, smooth, heavy])
@pytest.mark.parametrize("sharpness", [0.5, 2.0])
def test_the_true_error_is_within_the_bound_in_95_percent_of_calls(make, sharpness):
    """The bound holds over many samples of rows, for inputs and methods of different kinds."""
    generator = torch.Generator().manual_seed(int(10 * sharpness))
    q, k, v = (make(generator, 3, LAYOUT.tokens, 8, sharpness) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    held, tight = [], []
    for method in (get_method("composed", density=0.2), get_method("radial", decay=0.3, block=32)):
        order, plan = method.plan(LAYOUT, q, k)
        ordered = (q, k, v) if order is None else order.apply(q, k, v)
        out = block_attention(*ordered, plan, remainder=method.remainder)
        out = out if order is None else order.restore(out)
        truth = true_error(out, exact)
        for seed in range(100):
            drawn = sample_rows(out, (LAYOUT.tokens,) * 2, rows_to_check(LAYOUT.tokens), seed)
            estimate, bound = estimate_error(q, k, v, out, *drawn, (LAYOUT.tokens,) * 2).tolist()
            assert estimate <= bound
            held.append(truth <= bound)
            tight.append(bound / truth)
    assert sum(held) / len(held) >= CONFIDENCE
    assert sum(tight) / len(tight) < 4  # a bound that always says "anything" would hold too


@pytest.fixture(scope="module")
def captured():
    """Layout, q, k, v and dense output `[B, H, N, D]` of every layer of the shipped model in a late step."""
    from diffusers import WanPipeline

    pipe = WanPipeline.from_pretrained("samples/tiny-wan")
    pipe.set_progress_bar_config(disable=True)
    calls = []
    with dit_accel.accelerate(pipe, method="composed", density=0.5, dense_steps=2) as acceleration:
        acceleration.engines["transformer"].observer = calls.append
        pipe(
            prompt="a red ball moving right", height=64, width=64, num_frames=33, num_inference_steps=2,
            guidance_scale=1.0, generator=torch.Generator().manual_seed(0), output_type="latent",
        )  # fmt: skip
    return [(c.layout, c.q.contiguous(), c.k.contiguous(), c.v.contiguous(), c.out) for c in calls if c.state.step]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("aurora", {"density": 0.3}), ("aurora", {}), ("composed", {"density": 0.2}), ("a_shape", {"density": 0.25})],
)
def test_the_bound_holds_on_queries_and_keys_of_the_shipped_model(captured, name, parameters):
    """With the default method, too, whose error stands in few rows: it approximates all others very well."""
    held, tight = [], []
    for layout, q, k, v, exact in captured:
        call, method = CallContext(layout), get_method(name, **parameters)
        order, plan = method.plan(layout, q, k, v, call)
        ordered = (q, k, v) if order is None else order.apply(q, k, v)
        out = method.compute(*ordered, plan, call)
        out = out if order is None else order.restore(out)
        truth = true_error(out, exact)
        for seed in range(25):
            drawn = sample_rows(out, (layout.tokens,), rows_to_check(layout.tokens), seed)
            _, bound = estimate_error(q, k, v, out, *drawn, (layout.tokens,)).tolist()
            held.append(truth <= bound)
            tight.append(bound / truth)
    assert len(captured) == 8
    assert sum(held) / len(held) >= CONFIDENCE
    assert sum(tight) / len(tight) < 4


def test_the_estimate_is_right_on_average():
    """Weights and probabilities belong together: the mean over many draws is the true squared error."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (heavy(generator, 2, 200, 8, 1.0) for _ in range(3))
    exact = F.scaled_dot_product_attention(q, k, v)
    out = exact + exact.norm(dim=-1, keepdim=True) * torch.randn(exact.shape, generator=generator) / 10
    draws = (sample_rows(out, (200, 200), 20, seed) for seed in range(200))
    squares = [float(estimate_error(q, k, v, out, *drawn, (200, 200))[0]) ** 2 for drawn in draws]
    assert sum(squares) / len(squares) == pytest.approx(true_error(out, exact) ** 2, rel=0.02)


def test_weights_sum_to_the_number_of_rows():
    out = torch.randn(2, 3, 500, 8, generator=torch.Generator().manual_seed(0))
    weights = [sample_rows(out, (500, 300), 20, seed)[1] for seed in range(100)]
    mean = torch.stack(weights).mean(0).sum(-1)
    assert mean[0].tolist() == pytest.approx([500] * 3, rel=0.05)
    assert mean[1].tolist() == pytest.approx([300] * 3, rel=0.05)


def test_padding_is_neither_sampled_nor_attended():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (plain(generator, 2, 500, 8, 1.0) for _ in range(3))
    exact = F.scaled_dot_product_attention(q[:1, :, :400], k[:1, :, :400], v[:1, :, :400])
    out = torch.cat([exact, torch.full((1, 2, 100, 8), torch.nan)], 2)
    k[0, :, 400:], v[0, :, 400:] = torch.nan, torch.nan
    rows, weight = sample_rows(out, (400,), 5, seed=0)
    assert int(rows.max()) < 400
    assert float(estimate_error(q[:1], k[:1], v[:1], out, rows, weight, (400,))[1]) < 1e-5


def test_rows_are_seeded_and_under_one_percent():
    out = torch.randn(1, 2, 999, 8, generator=torch.Generator().manual_seed(0))
    for tokens in (4000, 4399, 8000, 75_600):
        assert 0 < rows_to_check(tokens) <= tokens / 100
    assert rows_to_check(3999) == 0
    drawn = sample_rows(out, (999,), 9, seed=5)[0]
    assert drawn.equal(sample_rows(out, (999,), 9, seed=5)[0])
    assert not drawn.equal(sample_rows(out, (999,), 9, seed=6)[0])
    seeds = {hash_seed(0, (layer, branch), step) for layer in range(40) for branch in "ab" for step in range(50)}
    assert len(seeds) == 4000


def test_a_head_that_computed_nan_is_reported_as_such():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (plain(generator, 2, 500, 8, 1.0) for _ in range(3))
    out = torch.full_like(q, torch.nan)
    assert estimate_error(q, k, v, out, *sample_rows(out, (500, 500), 5, seed=0), (500, 500)).isnan().all()


def drive(guard, errors, steps, density=0.25, tokens=12_000):
    """Run steps with an error that depends on density: the densities run, 1.0 for dense."""
    seen = []
    for step in range(steps):
        (method,), _, reason = guard.choose((0, "c"), (get_method("composed", density=density),), step, tokens)
        seen.append(1.0 if reason else method.density)
        if reason is None:
            bound = errors(step, method.density)
            guard._tracks[0, "c"].reading = _told(bound, method.density)
    return seen


def _told(bound, density):
    from dit_accel.guard import _Reading

    return _Reading.of(torch.tensor([bound / 2, bound, density]))


def test_a_layer_over_budget_gets_more_density_and_settles():
    seen = drive(Guard(0.05), lambda step, density: 0.06 * (1 - density), steps=12)
    assert seen == [0.25] * 12
    seen = drive(Guard(0.05), lambda step, density: 0.07 * (1 - density), steps=12)
    assert seen[0] == 0.25
    assert seen[1:] == [pytest.approx(0.375)] * 11  # 0.0525 at first, then 0.044: not far under the budget


def test_a_hopeless_layer_runs_dense_and_is_tried_less_and_less_often():
    seen = drive(Guard(0.01), lambda step, density: 0.9, steps=64)
    tried = [step for step, density in enumerate(seen) if density < 1]
    assert seen[0] < 1
    gaps = [later - earlier for earlier, later in pairwise(tried)]
    assert gaps == sorted(gaps)
    assert gaps[0] >= 4
    assert sum(density < 1 for density in seen) <= 6


def test_density_falls_again_only_after_a_calm_while():
    seen = drive(Guard(0.05), lambda step, density: 0.09 if step == 0 else 0.001, steps=10)
    assert seen[:2] == [0.25, pytest.approx(0.375)]
    assert seen[2:4] == [pytest.approx(0.375)] * 2
    assert seen[4:] == [0.25] * 6


@pytest.mark.parametrize(("tokens", "mean"), [(4080, 3), (6000, 2), (11_999, 2), (12_000, 1), (75_600, 1)])
def test_checks_are_rarer_in_short_sequences_and_fall_on_every_step_of_a_period(monkeypatch, tokens, mean):
    """Then their cost is under 1 % of that of attention, which falls with the length, and nothing periodic hides."""
    seen = checked(monkeypatch, lambda step: 0.001, tokens, steps=300)
    gaps = [later - earlier for earlier, later in pairwise(seen)]
    assert set(gaps) == set(range(1, 2 * mean))
    assert len(seen) == pytest.approx(300 / mean, rel=0.15)
    for period in (2, 3, 4, 5):
        assert Counter(step % period for step in seen).most_common()[-1][1] > 300 / mean / period / 2
    assert seen == checked(monkeypatch, lambda step: 0.001, tokens, steps=300)


def test_a_layer_over_budget_is_checked_at_every_step(monkeypatch):
    seen = checked(monkeypatch, lambda step: 0.09 if step < 20 else 0.03, 4080, steps=24)
    assert seen[:21] == list(range(21))
    assert len(seen) < 24


def checked(monkeypatch, bound, tokens, steps):
    """The steps that are checked, given the error bound at every step."""
    layout, key, guard = TokenLayout((tokens, 1, 1)), (0, "c"), Guard(0.05)
    monkeypatch.setattr("dit_accel.guard._raised", lambda methods, track: methods)
    monkeypatch.setattr("dit_accel.guard.sample_rows", lambda *_: (None, None))
    q, seen = torch.zeros(1, 1, 1, 1), []
    for step in range(steps):
        guard.choose(key, (get_method("composed"),), step, tokens)
        if guard.is_due(key, step):
            seen.append(step)
            told = torch.tensor([bound(step) / 2, bound(step)])
            monkeypatch.setattr("dit_accel.guard.estimate_error", lambda *_, told=told: told)
            guard.check(key, step, q, q, q, q, layout, 0.2)
    return seen


def watched(method, inputs, steps, seed=0, **schedule):
    """True errors, levels and reasons of steps of one layer at 4,096 tokens; `inputs` draws q, k, v `[B, N, H, D]`."""
    layer = nn.Identity()
    engine = Engine(method, Schedule(**schedule), [layer], break_even=1.0, seed=seed)
    seen = []
    for step in range(steps):
        q, k, v = inputs()
        exact = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
        engine.begin(RunState((4, 32, 32), step, 0.5))
        out = engine.attend(layer, q, k, v, dense=lambda exact=exact: exact)
        seen.append((true_error(out, exact), engine.calls[-1]))
    return seen


def test_a_remainder_that_is_renewed_now_and_then_is_checked_in_between():
    """Checks every third step would all fall on the steps that compute everything."""
    generator = torch.Generator().manual_seed(0)
    method = get_method("composed", density=0.25, remainder="history", period=3)
    seen = watched(method, lambda: 1.5 * torch.randn(3, 1, 4096, 1, 16, generator=generator), steps=4, max_error=0.05)
    assert seen[1][0] > 1  # all tokens are new at every step: what is kept is of no use
    assert [call.error is None for _, call in seen[:2]] == [True, False]
    assert all("dense until" in call.reason for _, call in seen[2:])


@pytest.mark.parametrize("seed", [0, 1])
def test_a_plan_that_grows_stale_is_checked_in_between(seed):
    """Queries find their keys elsewhere at every step: a fresh plan is exact, a kept one useless."""
    generator = torch.Generator().manual_seed(0)

    def moved():
        code = 12 * F.normalize(torch.randn(64, 16, generator=generator), dim=-1)
        k = code.repeat_interleave(64, 0)
        q = code[torch.randperm(64, generator=generator)].repeat_interleave(64, 0)
        return q[None, :, None], k[None, :, None], torch.randn(1, 4096, 1, 16, generator=generator)

    method = get_method("composed", order="raster", density=0.1, remainder="drop")
    seen = watched(method, moved, steps=9, seed=seed, max_error=0.2, refresh=3)
    assert seen[0][0] < 0.2 < 1 < seen[1][0]
    assert any(call.level or call.reason for _, call in seen)


def test_what_ran_dense_because_that_is_faster_comes_back_at_the_highest_density_that_is_not():
    guard, key, method = Guard(0.05), (0, "c"), get_method("composed", density=0.2)
    guard.choose(key, (method,), 0, 12_000)
    guard._tracks[key].level = 3
    guard.ran_dense(key, (method,), 1)
    assert guard._tracks[key].level == 2
    assert guard.choose(key, (method,), 1, 12_000)[2] is not None
    (raised,), level, reason = guard.choose(key, (method,), 9, 12_000)
    assert (raised.density, level, reason) == (pytest.approx(0.2 * 1.5**2), 2, None)


def test_a_nan_is_over_any_budget():
    seen = drive(Guard(5.0), lambda step, density: float("nan"), steps=2)
    assert seen[1] > seen[0]


def generate(steps=4, **options):
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, method="composed", tile=[2, 2, 4], break_even=1.0, **options) as acceleration:
        frames = pipe(
            prompt="a red ball", height=112, width=112, num_frames=17, num_inference_steps=steps, guidance_scale=1.0,
            generator=torch.Generator().manual_seed(0), output_type="np",
        ).frames[0]  # fmt: skip
        return frames, acceleration.report()


def test_the_report_holds_estimate_and_bound_and_the_result_does_not_change():
    frames, plain_run = generate(steps=2, density=0.5)
    checked, run = generate(steps=2, density=0.5, max_error=100.0)
    assert (frames == checked).all()
    assert all(call.error is None for call in plain_run.calls)
    rows = run.to_dict()["calls"]
    # Later steps are checked now and then: the sequence is short, and all layers keep to the budget.
    assert all("error" in row for row in rows if row["step"] == 0)
    assert all(0 <= row["error"] <= row["error_bound"] for row in rows if "error" in row)
    assert run.worst_error is not None
    assert f"bound {run.worst_error[1]:.3f}" in run.summary()


def test_an_impossible_budget_ends_dense_and_the_report_says_why():
    _, run = generate(density=0.25, max_error=1e-7)
    first = [call for call in run.calls if call.step == 0]
    later = [call for call in run.calls if call.step > 0]
    assert all(call.reason is None for call in first)
    assert all("guard: the error bound is over max_error 1e-07" in (call.reason or "") for call in later)
    assert "dense x 6: guard: the error bound is over max_error 1e-07" in run.summary()


def test_every_method_of_a_head_table_is_raised():
    table = {
        "modes": {
            "low": {"method": "composed", "parameters": {"density": 0.2, "tile": [2, 2, 4]}},
            "all": {"method": "dense"},
        },
        "heads": [["low", "all"], ["low", "low"]],
    }
    _, run = generate(steps=2, density=0.5, max_error=0.002, head_table=table)
    first, second = ([call for call in run.calls if call.step == step and call.layer == 0] for step in (0, 1))
    assert first[0].reason is None
    assert first[0].error[1] > 0.002
    assert second[0].density > first[0].density
    assert {shot.method for shot in run.pictures if shot.layer == 0} == {"composed", "dense"}


def test_too_short_sequences_run_dense_with_a_reason():
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, method="composed", density=0.5, max_error=0.1) as acceleration:
        pipe(prompt="x", height=16, width=16, num_frames=3, num_inference_steps=1, output_type="latent")
        assert all("too few to check" in (call.reason or "") for call in acceleration.report().calls)


def test_an_adversarial_input_is_densified():
    """Keys that pooling hides: each block holds two large opposite keys, so block means say nothing."""
    generator = torch.Generator().manual_seed(0)
    layout = TokenLayout((16, 16, 16))
    q = plain(generator, 1, layout.tokens, 16, 1.0)[:1]
    k = 0.01 * plain(generator, 1, layout.tokens, 16, 1.0)[:1]
    v = plain(generator, 1, layout.tokens, 16, 1.0)[:1]
    direction = F.normalize(q.mean(2), dim=-1)
    q = 3 * direction[:, :, None] + 0.1 * q
    k[:, :, 7::64], k[:, :, 8::64] = 20 * direction[:, :, None], -20 * direction[:, :, None]
    v[:, :, 7::64] *= 5
    guard, densities, errors = Guard(0.3), [], []
    method = get_method("composed", order="raster", block=64, density=0.13, remainder="drop")
    exact = F.scaled_dot_product_attention(q, k, v)
    for step in range(4):
        (chosen,), _, reason = guard.choose((0, "c"), (method,), step, layout.tokens)
        densities.append(1.0 if reason else chosen.density)
        out = exact
        if reason is None:
            _, plan = chosen.plan(layout, q, k)
            out = block_attention(q, k, v, plan)
            guard.check((0, "c"), step, q, k, v, out, layout, plan.density)
        errors.append(true_error(out, exact))
    assert errors[0] > 0.3
    assert densities[1] > densities[0]
    assert errors[-1] <= 0.3


def test_the_budget_is_validated():
    for wrong in (0, -1.0, float("nan"), float("inf"), True):
        with pytest.raises(ConfigError, match="max_error"):
            dit_accel.Schedule.make(max_error=wrong)
