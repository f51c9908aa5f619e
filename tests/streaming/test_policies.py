"""Attention policies of a stream: stored past, planned windows, and the merge of their parts."""

from __future__ import annotations

import math

import pytest
import torch
from policy_cases import GRID, TOKENS, call_for, dense, drive, tensors
from stream_cases import tiny_transformer

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.kernels.merge import merge
from dit_accel.methods.registry import get_method
from dit_accel.pipelines.streaming import flashblock
from dit_accel.pipelines.streaming.attention import CLEAN, DenseContext, attend_with_lse
from dit_accel.pipelines.streaming.flashblock import FlashBlock
from dit_accel.pipelines.streaming.planned import PlannedContext
from dit_accel.pipelines.streaming.policies import make_policy
from dit_accel.pipelines.streaming.runtime import CausalWan
from dit_accel.plan import BlockPlan
from dit_accel.streaming import StreamSettings


def test_attention_with_log_sum_exp(rotary):
    q, k, v = tensors(1, 3)
    out, lse = attend_with_lse(q, k, v)
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=0)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / 24**0.5
    torch.testing.assert_close(lse, scores.logsumexp(-1))


# The stored past.


@pytest.mark.parametrize("fresh", [0.0, 0.4])
@pytest.mark.parametrize("frames", [(0, 1, 2, 3, 4, 5), (0, 6, 7, 8, 3, 4)])
def test_reuse_with_the_same_queries_is_dense(rotary, frames, fresh):
    own, policy = range(frames[-3], frames[-3] + 3) if frames[1] == 1 else range(6, 9), FlashBlock({0}, (), fresh)
    q, k, v = tensors(3, 6)
    for step in (0, 1, 2):
        out = policy.attend(call_for(rotary, frames, own, step), q, k, v)
        torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=0)


def test_reuse_does_not_look_at_the_past_again_until_refresh_or_a_new_chunk(rotary):
    policy, own, frames = FlashBlock({0, 2}, (1,)), range(4, 6), range(6)
    q, k, v = tensors(2, 6)
    changed = torch.cat([torch.zeros_like(v[:, : 4 * TOKENS]), v[:, 4 * TOKENS :]], 1)

    def run(step, values, layer=0):
        return policy.attend(call_for(rotary, frames, own, step, layer), q, k, values)

    first = run(0, v)
    assert torch.equal(run(1, v), run(1, changed))
    torch.testing.assert_close(run(1, changed), first, atol=1e-5, rtol=0)
    torch.testing.assert_close(run(1, changed, layer=1), dense(q, k, changed), atol=1e-5, rtol=0)
    torch.testing.assert_close(run(2, changed), dense(q, k, changed), atol=1e-5, rtol=0)
    torch.testing.assert_close(run(CLEAN, v), dense(q, k, v), atol=1e-5, rtol=0)
    assert policy.bytes > 0
    policy.begin_chunk(own)
    assert policy.bytes == 0
    torch.testing.assert_close(run(1, v), dense(q, k, v), atol=1e-5, rtol=0)


def test_reuse_error_vanishes_with_the_change_of_the_queries(rotary):
    q, k, v = tensors(2, 6)
    errors = []
    for epsilon in (0.3, 0.03, 0.003):
        policy, moved = FlashBlock({0}, ()), q + epsilon * torch.randn_like(q)
        policy.attend(call_for(rotary, range(6), range(4, 6), 0), q, k, v)
        out = policy.attend(call_for(rotary, range(6), range(4, 6), 1), moved, k, v)
        errors.append(float((out - dense(moved, k, v)).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2] > 0


def test_fresh_blocks_and_stale_blocks_partition_the_past(rotary):
    q, k, v = tensors(2, 6)
    policy = FlashBlock({0}, (), fresh=0.5)
    policy.attend(call_for(rotary, range(6), range(4, 6), 0), q, k, v)
    changed = torch.cat([torch.zeros_like(v[:, : 4 * TOKENS]), v[:, 4 * TOKENS :]], 1)
    out = policy.attend(call_for(rotary, range(6), range(4, 6), 1), q, k, changed)
    fresh = policy._stored[0].fresh
    assert (fresh.sum(-1) == round(0.5 * fresh.shape[-1])).all()
    keys = fresh.repeat_interleave(64, -1)[..., : 4 * TOKENS].repeat_interleave(64, -2)[..., : 2 * TOKENS, :]
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) / 24**0.5).softmax(-1)
    expected = torch.einsum("bhqk,bkhd->bqhd", weights, changed)
    expected += torch.einsum("bhqk,bkhd->bqhd", weights[..., : 4 * TOKENS] * ~keys, v[:, : 4 * TOKENS])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    everything = FlashBlock({0}, (), fresh=1.0)
    torch.testing.assert_close(
        everything.attend(call_for(rotary, range(6), range(4, 6), 1), q, k, v), dense(q, k, v), atol=1e-5, rtol=0
    )


def test_extreme_scores_stay_finite(rotary):
    q, k, v = tensors(1, 3)
    policy = FlashBlock({0}, ())
    for step in (0, 1):
        out = policy.attend(call_for(rotary, range(3), range(2, 3), step), 300 * q, 300 * k, v)
        assert out.isfinite().all()


def test_external_attention_runs_as_often_as_it_is_refreshed(monkeypatch):
    count, original = [], flashblock._attend_past

    def spy(*args):
        count.append(1)
        return original(*args)

    monkeypatch.setattr(flashblock, "_attend_past", spy)
    drive(lambda: FlashBlock({0, 1}, ()), count=4)
    assert len(count) == 2 * 2 * 3  # refreshed steps, layers, chunks with a past


def test_refreshing_always_is_the_dense_stream():
    plain, _ = drive(DenseContext)
    kept, driver = drive(lambda: FlashBlock(range(3), ()))
    torch.testing.assert_close(kept, plain, atol=1e-4, rtol=1e-4)
    reused, _ = drive(lambda: FlashBlock({0}, ()))
    assert (reused - plain).abs().max() > 1e-4
    driver.flush()
    assert driver.branches[0].policy.bytes == 0


def test_wrong_share_is_named():
    with pytest.raises(ConfigError, match=r"flashblock.fresh.*1.5"):
        FlashBlock(fresh=1.5)


# Plans of the library inside a window.


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("composed", {"density": 1.0, "block": 16, "order": "raster"}),
        ("composed", {"density": 1.0, "tile": [2, 2, 4]}),
        ("neighborhood", {"window": [17, 13, 15]}),
    ],
)
def test_a_plan_that_keeps_everything_is_dense(rotary, name, parameters):
    policy = PlannedContext(get_method(name, **parameters), min_frames=1)
    q, k, v = tensors(3, 9)
    frames, own = (0, 1, 20, 21, 22, 17, 18, 19, 16), range(20, 23)
    out = policy.attend(call_for(rotary, frames, own), q, k, v)
    torch.testing.assert_close(out, dense(q, k, v), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("composed", {"density": 0.3, "block": 16, "order": "raster", "remainder": "drop"}),
        ("composed", {"density": 0.3, "tile": [2, 2, 4], "remainder": "drop", "sink_frames": 1}),
        ("radial", {"block": 16}),
        ("neighborhood", {"window": [3, 3, 3]}),
    ],
)
def test_rows_of_the_chunk_are_those_of_the_whole_video(rotary, name, parameters):
    method = get_method(name, **parameters)
    policy = PlannedContext(method, min_frames=1)
    q, k, v = tensors(3, 9)
    frames, own = (0, 1, 20, 21, 22, 17, 18, 19, 16), range(20, 23)
    out = policy.attend(call_for(rotary, frames, own), q, k, v)
    from dit_accel.layout import TokenLayout

    layout = TokenLayout((9, *GRID), prefix_frames=2)
    place = [frames.index(frame) for frame in sorted(frames)]
    k, v = (x.unflatten(1, (9, -1))[:, place].flatten(1, 2) for x in (k, v))
    whole = q.repeat(1, 3, 1, 1)
    order, plan = method.plan(layout, *(x.transpose(1, 2) for x in (whole, k, v)))
    mask = plan.to_token_mask()
    if order is not None:
        inverse = order.inverse
        mask = mask[..., inverse, :][..., inverse]
    expected = dense(whole, k, v, mask)[:, 6 * TOKENS :]
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert mask.float().mean() < 0.9


def test_planned_windows_stream_and_short_ones_are_dense():
    plain, _ = drive(DenseContext)
    sparse, _ = drive(lambda: PlannedContext(get_method("composed", density=0.3, block=4, order="raster")))
    assert torch.equal(sparse[:, :, :4], plain[:, :, :4])
    assert (sparse[:, :, 6:] - plain[:, :, 6:]).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("name", "reason"), [("aurora", "differs between heads"), ("svg2", "differs between heads"), ("psa", "more than")]
)
def test_methods_that_cannot_serve_are_refused_before_a_model_is_loaded(name, reason):
    with pytest.raises(ConfigError, match=rf"stream\.attention\.name: '{name}' cannot run .*{reason}"):
        make_policy(StreamSettings(attention={"name": name}))


def test_a_method_says_the_factor_on_the_logits(rotary):
    """CLEAR scales them for many tokens: whatever it is, it reaches the stream."""
    whole = {"radius": 100.0, "tile": [1, 4, 4]}
    q, k, v = tensors(3, 9)
    call = call_for(rotary, range(9), range(6, 9))
    plain, scaled = (
        PlannedContext(get_method("clear", proportional=proportional, **whole), min_frames=1).attend(call, q, k, v)
        for proportional in (False, True)
    )
    torch.testing.assert_close(plain, dense(q, k, v), atol=1e-5, rtol=0)
    factor = (math.log(9 * TOKENS) / math.log(64 * 64 + 512)) ** 0.5
    torch.testing.assert_close(scaled, dense(factor * q, k, v), atol=1e-5, rtol=0)


def test_orders_per_head_are_refused(rotary):
    class PerHead:
        name, is_static, remainder, precision, requested_density = "per_head", False, None, None, None

        def logit_scale(self, *_):
            return None

        def plan(self, layout, q, k, v, call):
            from dit_accel.order import TokenOrder
            from dit_accel.plan import Blocking

            blocks = Blocking.uniform(layout.tokens, 16)
            order = TokenOrder(torch.arange(layout.tokens).expand(1, 2, -1).contiguous())
            return order, BlockPlan.full(blocks, blocks)

    q, k, v = tensors(3, 9)
    with pytest.raises(UnsupportedError, match="differs between heads"):
        PlannedContext(PerHead()).attend(call_for(rotary, range(9), range(6, 9)), q, k, v)


# The merge of parts.


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("cuts", [(0,), (1,), (40, 41), (13, 80, 125), (126,)])
def test_parts_of_any_length_merge_to_dense_attention_in_any_order(dtype, tolerance, cuts):
    q, k, v = (x.to(dtype) for x in tensors(1, 3))
    nothing = torch.zeros_like(q), torch.full((*q.shape[:1], q.shape[2], q.shape[1]), -torch.inf)
    cut = zip(*(x.tensor_split(cuts, dim=1) for x in (k, v)), strict=True)
    parts = [attend_with_lse(q, a, b) if a.shape[1] else nothing for a, b in cut]
    outs, lses = [out.transpose(1, 2) for out, _ in parts], [lse for _, lse in parts]
    expected = dense(q, k, v).transpose(1, 2).float()
    together, lse = merge(outs, lses)
    torch.testing.assert_close(together.float(), expected, atol=tolerance, rtol=0)
    backwards, _ = merge(outs[::-1], lses[::-1])
    torch.testing.assert_close(backwards.float(), together.float(), atol=tolerance, rtol=0)
    pairwise = outs[0], lses[0]
    for out, other in zip(outs[1:], lses[1:], strict=True):
        pairwise = merge((pairwise[0], out), (pairwise[1], other))
    torch.testing.assert_close(pairwise[0].float(), together.float(), atol=tolerance, rtol=0)
    torch.testing.assert_close(pairwise[1], lse, atol=max(tolerance, 1e-4), rtol=0)


def test_what_is_stored_does_not_grow():
    runtime, sizes = CausalWan(tiny_transformer(layers=1, heads=1, head_dim=12)), set()
    changes = {"chunk": 1, "window": 4, "sink": 1, "steps": (1000.0, 500.0), "positions": "reindex"}
    _, driver = drive(lambda: FlashBlock({0}, ()), count=6, runtime=runtime, **changes)
    for _ in range(100):
        driver.next()
        sizes.add(driver.bytes)
    assert len(sizes) == 1
