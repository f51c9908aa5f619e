"""Re-ttention (arXiv 2505.22918): window, share and rest from the last dense step."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, masked, tensors, token_mask
from torch.nn import functional as F

import dit_accel
from dit_accel.errors import ConfigError
from dit_accel.layer_methods import check_policy
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.planner import Planner, PlanRequest
from dit_accel.report.records import CallRecord
from dit_accel.samples.tiny_random import random_wan_pipeline
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

LAYOUT = TokenLayout((3, 4, 5), 7, "before")


def run(method, steps, layout=LAYOUT, drift=0.0):
    """Outputs of some steps, with q, k, v that drift, and the contexts of the calls."""
    memory, outs, calls = {}, [], []
    for step in steps:
        q, k, v = (x + drift * step for x in tensors(layout))
        calls.append(CallContext(layout, step=step, memory=memory))
        outs.append(attend(method, layout, q, k, v, call=calls[-1]))
    return outs, calls


@pytest.mark.parametrize("window", ["frame", "band"])
def test_the_window(window):
    method = get_method("re_ttention", window=window, density=0.3, block=8)
    mask, video = token_mask(method, LAYOUT), LAYOUT.video_slice()
    size = 20 if window == "frame" else 60
    place = torch.arange(60) % size
    near = (place.unsqueeze(-1) - place).abs() <= int(size * 0.3) // 2
    assert torch.equal(mask[video, video], near)
    assert mask[:7].all()
    assert mask[:, :7].all()


def test_conditioning_frames_keep_their_weight_between_refreshes():
    layout = TokenLayout((4, 3, 5), 6, "after", prefix_frames=1)
    method = get_method("re_ttention", density=0.2, block=8, ramp=0.0)
    mask = token_mask(method, layout)
    assert mask[:, :15].all()
    assert not mask[:60, 15:60].all()
    # What changes in them since the refresh shows at once, as all attend them; elsewhere it waits for the next one.
    q, k, v = tensors(layout)
    call = CallContext(layout, step=5, memory={})
    attend(method, layout, q, k, v, call=call)
    later = v.clone()
    later[:, :, :15] += 1
    out = attend(method, layout, q, k, later, call=CallContext(layout, step=6, memory=call.memory))
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, later))


def test_a_refresh_is_dense_and_the_report_can_know_it():
    method = get_method("re_ttention", density=0.2, block=8)
    q, k, v = tensors(LAYOUT)
    (first,), (call,) = run(method, [10])
    torch.testing.assert_close(first, F.scaled_dot_product_attention(q, k, v))
    assert call.extra_density == 1


def test_frozen_tensors_are_reproduced_between_refreshes():
    method = get_method("re_ttention", density=0.2, block=8, ramp=0.0)
    outs, calls = run(method, [5, 6, 7, 9])
    for out in outs[1:]:
        torch.testing.assert_close(out, outs[0])
    assert [call.extra_density for call in calls] == [1, 0, 0, 0]


def test_share_ramps_from_the_second_sparse_step_and_never_exceeds_one():
    method = get_method("re_ttention", density=0.2, block=8, ramp=0.1, period=30)
    q, k, v = tensors(LAYOUT)
    mask = token_mask(method, LAYOUT)
    window, dense = masked(LAYOUT, q, k, v, mask), F.scaled_dot_product_attention(q, k, v)
    weights = (q @ k.transpose(-1, -2) / 4).softmax(-1)
    share = (weights * mask).sum(-1, keepdim=True)
    outs, _ = run(method, [30, 31, 33, 59])
    for out, steps in zip(outs[1:], (0, 2, 28), strict=True):
        torch.testing.assert_close(out, (share + 0.1 * steps).clamp(max=1) * window + dense - share * window)


def test_the_rest_is_that_of_the_last_refresh():
    method = get_method("re_ttention", density=0.2, block=8, ramp=0.0)
    outs, calls = run(method, [3, 4, 5, 6], drift=0.02)
    assert [call.extra_density for call in calls] == [1, 0, 1, 0]
    q, k, v = (x + 0.02 * 5 for x in tensors(LAYOUT))
    torch.testing.assert_close(outs[2], F.scaled_dot_product_attention(q, k, v))


def test_a_full_window_is_dense_at_every_step():
    layout = TokenLayout((1, 1, 30))
    method = get_method("composed", order="raster", density=1.0, block=8, remainder="history")
    for out, step in zip(run(method, [5, 6, 7], layout, 0.1)[0], [5, 6, 7], strict=True):
        q, k, v = (x + 0.1 * step for x in tensors(layout))
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


def test_composed_keeps_its_plan_from_one_refresh_to_the_next():
    method = get_method("composed", order="raster", density=0.3, block=8, remainder="history")
    layout, memory, plans = TokenLayout((2, 4, 8)), {}, []
    for step in (5, 6, 7, 10):
        q, k, v = tensors(layout, seed=step)
        call = CallContext(layout, step=step, memory=memory)
        plans.append(method.plan(layout, q, k, v, call)[1])
        method.compute(q, k, v, plans[-1], call)
    assert plans[1] is plans[0]
    assert plans[2] is plans[0]
    assert plans[3] is not plans[0]


@pytest.mark.parametrize(
    ("schedule", "shares", "call_of"),
    [
        ({"layer_groups": [[0, 2]]}, False, lambda layer: (layer, "cond")),
        ({"layer_groups": [[0, 2]], "layer_heads": "index"}, False, lambda layer: (layer, "cond")),
        ({"refresh": 3}, True, lambda branch: (0, ("cond", "uncond")[branch])),
        ({"head_groups": 1}, True, lambda branch: (0, ("cond", "uncond")[branch])),
    ],
)
@pytest.mark.parametrize("absent", [None, 0, 1])
def test_a_rest_goes_with_the_plan_that_left_it(schedule, shares, call_of, absent):
    """Also where another layer or branch made that plan, and does not run at the next step or has another by then."""
    layout = TokenLayout((4, 8, 8))
    method = get_method(
        "composed", density=0.25, tile=[2, 2, 2], remainder="history", across_branches=shares, ramp=0.0, period=3
    )
    planner = Planner(Schedule.make(**schedule))
    for step in range(6):
        for number in range(2):
            if number == absent and step in (1, 3):  # held dense, at a step between refreshes and at one of them
                continue
            layer, branch = call_of(number)
            qkv = tensors(layout, seed=number + 2 * (step // 3))
            wanted = PlanRequest(method, layer, layout, RunState(layout.grid, step, 0.5, branch))
            planned, ordered = planner.plan(wanted, qkv, CallRecord("t", layer, step, branch, 0, "", None))
            out = method.compute(*ordered, planned.plan, planner.call(wanted, 1))
            # The tensors are those of the last refresh, so that part and rest together are dense again.
            torch.testing.assert_close(planned.order.restore(out), F.scaled_dot_product_attention(*qkv))


@pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"overrides": [{"layers": [[1, 2]], "parameters": {"density": 0.5}}]},
        {"head_table": {"modes": {"own": {}, "all": {"method": "dense"}}, "heads": [["all", "own"]]}},
    ],
)
def test_search_steps_do_not_renew_what_a_plan_is_held_for(schedule):
    method = get_method("composed", remainder="history")
    check_policy(method, Schedule.make(**schedule))
    check_policy(get_method("composed"), Schedule.make(search_steps=[0, 3], **schedule))
    with pytest.raises(ConfigError, match=r"schedule\.search_steps: .*remainder 'history'"):
        check_policy(method, Schedule.make(search_steps=[0, 3], **schedule))


def test_a_density_that_is_no_share_is_refused():
    with pytest.raises(ConfigError, match=r"re_ttention\.density"):
        get_method("re_ttention", density=0.0)


def test_generations_do_not_see_each_other_and_refreshes_are_reported():
    pipe = random_wan_pipeline()
    pipe.set_progress_bar_config(disable=True)
    with dit_accel.accelerate(pipe, method="re_ttention", density=0.2, block=8, break_even=1.0) as acceleration:
        first, second = (generate(pipe) for _ in range(2))
        densities = {call.step: call.density for call in acceleration.report().calls}
    torch.testing.assert_close(first, second)
    assert densities[0] > 1 > densities[1]


def generate(pipe):
    return pipe(
        "a dog",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=4,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).frames


def test_text_attends_everything_at_every_step():
    method = get_method("re_ttention", density=0.2, block=8)
    for out, step in zip(run(method, [5, 6, 8], drift=0.05)[0], [5, 6, 8], strict=True):
        q, k, v = (x + 0.05 * step for x in tensors(LAYOUT))
        torch.testing.assert_close(out[:, :, :7], F.scaled_dot_product_attention(q, k, v)[:, :, :7])


@pytest.mark.parametrize(
    ("name", "more"),
    [("re_ttention", {"ramp": 0.0}), ("composed", {"remainder": "history", "ramp": 0.0, "order": "raster"})],
)
def test_at_another_density_all_keys_are_computed_anew(name, more):
    memory, extra = {}, []
    q, k, v = tensors(LAYOUT)
    for step, density in ((5, 0.1), (6, 0.1), (7, 0.4), (8, 0.4)):
        call = CallContext(LAYOUT, step=step, memory=memory)
        out = attend(get_method(name, density=density, block=8, **more), LAYOUT, q, k, v, call=call)
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
        extra.append(call.extra_density)
    assert extra == [1, 0, 1, 0]
