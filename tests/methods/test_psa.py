"""Pyramid sparse attention against softmax attention over the pooled keys, written out."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError, PlanError
from dit_accel.kernels import block_attention
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.remainders.partial import PartialAttention
from dit_accel.remainders.pyramid import add_pooled_levels, coarsest_levels, level_density, pyramid_plan
from dit_accel.reuse import union_of_heads
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

LAYOUT = TokenLayout((4, 8, 8))
TEXT = TokenLayout((3, 4, 8), 11, "after", (107, 101))


def attention(levels, layout, q, k, v, rows, columns):
    plan = pyramid_plan(levels, rows, columns)
    kv_len = None if layout.valid is None else torch.tensor(layout.valid)
    out, lse = block_attention(q, k, v, plan, kv_len=kv_len, return_lse=True)
    return add_pooled_levels(PartialAttention(out, lse, q, k, v, plan, CallContext(layout)))


def written_out(levels, q, k, v, rows, columns):
    """Row by row: softmax over single and pooled keys with ln L, for whole blocks, `[1, H, N, D]`."""
    out = torch.zeros_like(q)
    for head in range(q.shape[1]):
        for i in range(rows.count):
            queries = q[0, head, rows.starts[i] : rows.starts[i + 1]]
            logits, values = [], []
            for j in range(columns.count):
                level = int(levels[0, head, i, j])
                if level:
                    inside = slice(int(columns.starts[j]), int(columns.starts[j + 1]))
                    keys, vals = (x[0, head, inside].unflatten(0, (-1, level)).mean(1) for x in (k, v))
                    logits.append(queries @ keys.T / q.shape[-1] ** 0.5 + torch.tensor(float(level)).log())
                    values.append(vals)
            out[0, head, rows.starts[i] : rows.starts[i + 1]] = torch.cat(logits, -1).softmax(-1) @ torch.cat(values)
    return out


def random_levels(rows, columns, batch=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([0, 1, 2, 4, 8], dtype=torch.uint8)
    levels = table[torch.randint(5, (batch, 2, rows.count, columns.count), generator=generator)]
    levels[..., 0] = 1
    return levels


def test_any_mixture_of_levels_is_one_softmax_over_pooled_keys():
    q, k, v = cases.tensors(LAYOUT, batch=1)
    rows, columns = LAYOUT.blocks(32), LAYOUT.blocks(16)
    levels = random_levels(rows, columns)
    levels[0, 0, 0, 1:] = 0
    out = attention(levels, LAYOUT, q, k, v, rows, columns)
    torch.testing.assert_close(out, written_out(levels, q, k, v, rows, columns), atol=1e-6, rtol=1e-5)
    moved = levels.clone()
    moved[0, 1, 3, 5] = 8 if levels[0, 1, 3, 5] != 8 else 2
    changed = (attention(moved, LAYOUT, q, k, v, rows, columns) != out).any(-1)
    assert not changed[0, 0].any()
    assert changed[0, 1].nonzero().squeeze(-1).tolist() == list(range(96, 128))


def test_equal_keys_in_every_group_are_exact_at_any_level():
    q, k, v = cases.tensors(LAYOUT, batch=1)
    k, v = (x.unflatten(2, (-1, 8))[..., :1, :].expand(-1, -1, -1, 8, -1).flatten(2, 3) for x in (k, v))
    rows, columns = LAYOUT.blocks(32), LAYOUT.blocks(16)
    levels = random_levels(rows, columns).clamp(min=1)
    out = attention(levels, LAYOUT, q, k, v, rows, columns)
    torch.testing.assert_close(out, cases.dense(LAYOUT, q, k, v), atol=2e-6, rtol=1e-5)


def test_levels_fit_short_blocks_and_padding():
    q, k, v = cases.tensors(TEXT)
    columns = TEXT.blocks(40)
    assert columns.lengths.tolist() == [40, 40, 16, 11]
    k[1, :, 101:] = torch.nan
    coarsest = coarsest_levels(k, columns, TEXT, None)
    assert coarsest[0, 0].tolist() == [8, 8, 8, 1]
    assert coarsest[1, 0].tolist() == [8, 8, 8, 1]
    k, v = k.nan_to_num(), v.clone()
    k[:, :, :96], v[:, :, :96] = (
        x[:, :, :96].unflatten(2, (-1, 8))[..., :1, :].expand(-1, -1, -1, 8, -1).flatten(2, 3) for x in (k, v)
    )
    out = cases.attend(get_method("psa", block=40, key_block=40, ends=[0.1, 0.3, 0.6, 1.0]), TEXT, q, k, v)
    for item, length in enumerate(TEXT.valid):
        expected = cases.dense(TEXT, q, k, v)[item, :, :length]
        torch.testing.assert_close(out[item, :, :length], expected, atol=2e-6, rtol=1e-5)


def test_similarity_caps_levels_and_never_raises_them():
    k = torch.randn(1, 1, 256, 16, generator=torch.Generator().manual_seed(0))
    k[:, :, :16] = k[:, :, :1]
    k[:, :, 16:32] = torch.eye(16)
    columns = LAYOUT.blocks(16)
    limits = (0.7, 0.65, 0.6)
    coarsest = coarsest_levels(k, columns, LAYOUT, limits)[0, 0]
    assert coarsest[:2].tolist() == [8, 1]
    q, k2, v = cases.tensors(LAYOUT)
    free, capped = (
        get_method("psa", block=16, key_block=16, similarity=s).plan(LAYOUT, q, k2, v)[1].levels for s in (None, limits)
    )
    assert (capped <= free).all()
    assert ((capped == 0) == (free == 0)).all()
    assert (capped < free).any()


def test_levels_go_by_rank_in_counts_or_by_mass():
    q, k, v = cases.tensors(LAYOUT)
    rule = get_method("psa", block=16, key_block=8, ends=[0.1, 0.2, 0.4, 0.75])
    call = CallContext(LAYOUT)
    levels = rule.plan(LAYOUT, q, k, v, call)[1].levels
    for level, count in ((1, 3), (2, 3), (4, 6), (8, 12), (0, 8)):
        assert ((levels == level).sum(-1) == count).all()
    scores = rule.scores(q, k, call, *rule.blocks(LAYOUT))
    rank = torch.where(levels == 0, 16, levels.long())
    for finer in (1, 2, 4, 8):
        worst = scores.masked_fill(rank != finer, torch.inf).amin(-1)
        assert (worst >= scores.masked_fill(rank <= finer, -torch.inf).amax(-1)).all()
    mass = get_method("psa", block=16, key_block=8, rule="mass", ends=[0.3, 0.5, 0.6, 0.8])
    levels = mass.plan(LAYOUT, q, k, v, call)[1].levels
    share = scores.softmax(-1)
    for finer, end in ((1, 0.3), (2, 0.5), (4, 0.6), (8, 0.8)):
        inside = (levels > 0) & (levels <= finer)
        assert ((share * inside).sum(-1) >= end - 1e-5).all()
    assert ((levels == 1).sum(-1) >= int(0.06 * 32) + 1).all()


@pytest.mark.parametrize("density", [0.05, 0.15, 0.4, 0.9])
def test_a_density_scales_the_levels(density):
    layout = TokenLayout((4, 16, 16))
    q, k, v = cases.tensors(layout)
    plan = get_method("psa", block=32, key_block=8, density=density).plan(layout, q, k, v)[1]
    total = plan.density_per_head() + level_density(plan.levels, plan.q_blocks, plan.k_blocks)
    assert total.flatten().tolist() == pytest.approx([density] * 4, abs=0.02)
    if density == 0.15:
        assert torch.equal(plan.levels, get_method("psa", block=32, key_block=8).plan(layout, q, k, v)[1].levels)


def test_the_density_is_that_of_products():
    rows, columns = TEXT.blocks(32), TEXT.blocks(16)
    levels = random_levels(rows, columns)
    tokens = levels[..., rows.block_of_token(), :][..., columns.block_of_token()].double()
    expected = torch.where(tokens > 1, 1 / tokens, 0.0).mean((-1, -2))
    torch.testing.assert_close(level_density(levels, rows, columns), expected)


def test_the_engine_reports_all_levels_of_own_and_of_shared_plans():
    def run(**schedule):
        method = get_method("psa", block=16, key_block=16, ends=[0.2, 0.4, 0.6, 0.8])
        modules = [nn.Identity(), nn.Identity()]
        engine = Engine(method, Schedule.make(**schedule), modules, break_even=1.0)
        engine.begin(RunState((4, 8, 8), 0, 0.5))
        q, k, v = (x.transpose(1, 2) for x in cases.tensors(LAYOUT, batch=1))
        outs = [engine.attend(module, q, k, v, dense=lambda: q) for module in modules]
        return engine, outs

    engine, outs = run()
    assert engine.calls[0].density == pytest.approx(3 / 16 + 3 / 32 + 3 / 64 + 3 / 128, abs=0.02)
    assert not torch.equal(outs[0], outs[1])
    same = run(layer_groups=[[0, 2]], layer_heads="index")[1]
    assert torch.equal(same[0], same[1])
    one = run(head_groups=1)[0]
    assert one.calls[0].density == pytest.approx(engine.calls[0].density, abs=0.02)
    united = run(layer_groups=[[0, 2]])[0]
    assert united.calls[1].density > united.calls[0].density == engine.calls[0].density


def test_a_shared_plan_reads_every_block_at_the_finest_level_of_any_head():
    blocks = Blocking.uniform(64, 16)
    levels = torch.tensor([[[[1, 2, 0, 8]], [[1, 4, 0, 2]], [[1, 1, 0, 0]]]], dtype=torch.uint8).expand(1, 3, 4, 4)
    united = union_of_heads(pyramid_plan(levels, blocks, blocks))
    assert united.levels[0, 0, 0].tolist() == [1, 1, 0, 2]
    assert united.validate().to_mask()[0, 0, 0].tolist() == [True, True, False, False]


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="must not descend"):
        get_method("psa", ends=[0.5, 0.2, 0.6, 0.7])
    with pytest.raises(ConfigError, match="use rule='count'"):
        get_method("psa", density=0.2, rule="mass")
    assert isinstance(get_method("psa").plan(LAYOUT, *cases.tensors(LAYOUT)[:2])[1].to("cpu"), BlockPlan)


def test_level_one_everywhere_is_dense_and_a_row_without_it_is_refused():
    q, k, v = cases.tensors(LAYOUT, batch=1)
    rows, columns = LAYOUT.blocks(32), LAYOUT.blocks(16)
    levels = torch.ones(1, 2, rows.count, columns.count, dtype=torch.uint8)
    exact = cases.dense(LAYOUT, q, k, v)
    torch.testing.assert_close(attention(levels, LAYOUT, q, k, v, rows, columns), exact, atol=2e-6, rtol=1e-5)
    levels[:, 1, 2] = 0
    with pytest.raises(PlanError, match="must select at least one key block"):
        pyramid_plan(levels, rows, columns)


def test_layers_sample_other_places_and_steps_the_same():
    q, k, v = cases.tensors(LAYOUT)
    rule = get_method("psa", block=16, key_block=16)
    calls = [CallContext(LAYOUT, *at) for at in ((0, 0), (0, 5), (1, 0))]
    first, later, other = (rule.plan(LAYOUT, q, k, v, call)[1].levels for call in calls)
    assert torch.equal(first, later)
    assert not torch.equal(first, other)
