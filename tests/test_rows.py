"""Queries divided between processes that hold all keys: every share gives its rows of the whole call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_accel.engine import Engine
from dit_accel.errors import PlanError
from dit_accel.families.parallel import refusal_of_ring
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods
from dit_accel.order import TokenOrder
from dit_accel.rows import rows_of_order
from dit_accel.schedule import Schedule
from dit_accel.shard import TokenShard
from dit_accel.state import RunState

SMALL = {
    "a_shape": {"block": 4, "n_init": 4, "n_local": 9},
    "clear": {"radius": 2.0, "tile": (1, 4, 4), "remainder": "mean"},
    "grat": {"tile": (1, 2, 2)},
    "neighborhood": {"window": (1, 3, 5), "tile": (1, 2, 2), "key_tile": (1, 2, 3)},
    "radial": {"block": 4},
    "sliding_tile": {"window": (1, 3, 3), "tile": (1, 2, 2)},
    "sparse_vdit": {"block": 4},
    "sink_recent": {"recent_frames": 1, "sink_frames": 1, "block": 4},
}
DIVISIBLE = sorted(name for name in list_methods() if name != "dense" and get_method(name).needs_all_queries is None)


def engine(method, **schedule):
    module = nn.Identity()
    timetable = Schedule.make(**{"dense_steps": 0, "dense_layers": [], "min_tokens": 0, **schedule})
    return Engine(method, timetable, [module], break_even=1.0), module


@pytest.mark.parametrize("name", DIVISIBLE)
@pytest.mark.parametrize(
    ("grid", "text", "words"), [((3, 5, 7), "none", 0), ((2, 5, 5), "after", 7), ((1, 9, 7), "before", 3)]
)
def test_shares_of_the_queries_give_the_rows_of_the_whole_call(name, grid, text, words):
    policy, module = engine(get_method(name, **SMALL[name]))
    layout = TokenLayout(grid, words, text)
    q, k, v = (torch.randn(2, layout.tokens, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    policy.begin(RunState(grid, 0, 1.0, "cond", 1, 0, 2))
    whole = policy.attend(module, q, k, v, dense=pytest.fail, text=text)
    assert policy.calls[-1].reason is None
    seen = torch.zeros(layout.tokens, dtype=torch.int64)
    for index in range(3):
        shard = TokenShard(index, 3)
        tokens = shard.tokens(layout)
        seen[tokens] += 1
        for _ in range(2):  # made, and kept
            part = policy.attend(module, q[:, tokens], k, v, dense=pytest.fail, text=text, shard=shard)
            torch.testing.assert_close(part, whole[:, tokens], rtol=1e-5, atol=1e-5)
    assert seen.eq(1).all()
    assert len({call.density for call in policy.calls}) == 1


def test_dense_calls_of_a_share_get_all_keys():
    policy, module = engine(get_method("radial"), dense_steps=1)
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 12, 2, 8)
    policy.begin(RunState((1, 3, 4), 0, 1.0, "cond", 2, 0, 1))
    out = policy.attend(module, q, k, k, dense=lambda: q + 1, shard=TokenShard(0, 2))
    assert torch.equal(out, q + 1)
    assert "dense_steps" in policy.calls[-1].reason


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (get_method("composed"), "'composed': it chooses key blocks by what all queries hold"),
        (get_method("re_ttention"), "'re_ttention': it computes more than its blocks"),
        (get_method("clear", remainder="pooled"), "'clear': it computes more than its blocks"),
    ],
)
def test_methods_whose_queries_depend_on_each_other_say_so(method, reason):
    assert reason in refusal_of_ring([get_method("radial"), method])


def test_a_guard_needs_all_queries():
    assert "max_error" in refusal_of_ring([get_method("radial")], 0.05)
    assert refusal_of_ring([get_method("radial")]) is None


def test_an_order_per_head_cannot_be_divided():
    with pytest.raises(PlanError, match="one order for all heads"):
        rows_of_order(TokenOrder(torch.arange(6).expand(1, 2, 6).contiguous()), torch.arange(3))


def test_the_rows_of_an_order_stand_as_they_do_in_the_whole():
    order = TokenOrder(torch.tensor([4, 0, 3, 1, 2]))
    mine, at = rows_of_order(order, torch.tensor([0, 2, 4]))
    assert at.tolist() == [0, 1, 4]
    assert torch.tensor([0, 2, 4])[mine.query].tolist() == [4, 0, 2]
    assert torch.equal(mine.key_index, order.query)


def test_the_page_names_the_methods_that_can_be_divided():
    page = (Path(__file__).parents[1] / "docs" / "batches.md").read_text(encoding="utf-8")
    named = page.partition("**Ring attention**")[2].partition(", with")[0]
    assert sorted(set(re.findall(r"`(\w+)`", named)) - {"pooled"}) == DIVISIBLE
