"""What every static method must be: valid on any grid, blind to q and k, exact at its widest, silent about padding."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_cases import attend, masked, tensors, token_mask
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.planner import Planner, PlanRequest
from dit_accel.report.records import CallRecord
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

SMALL = {
    "a_shape": {"n_init": 5, "n_local": 9, "block": 8},
    "clear": {"radius": 2.0, "tile": (1, 2, 3)},
    "grat": {"tile": (1, 2, 2)},
    "neighborhood": {"window": (2, 3, 3), "tile": (2, 2, 2)},
    "radial": {"block": 8, "decay": 0.1},
    "sink_recent": {"recent_frames": 1, "block": 8},
    "sliding_tile": {"window": (1, 1, 3), "tile": (2, 2, 2)},
    "sparse_vdit": {"mode": "multi_diagonal", "density": 0.2, "block": 8},
}
WIDE = {
    "a_shape": {"n_local": 10**6},
    "clear": {"radius": 99.0},
    "dense": {},
    "grat": {"tile": (9, 99, 99)},
    "neighborhood": {"window": (0, 0, 0)},
    "radial": {"density": 1.0},
    "sink_recent": {"recent_frames": 99},
    "sliding_tile": {"window": (0, 0, 0)},
    "sparse_vdit": {"density": 1.0},
}
LAYOUTS = [
    TokenLayout((4, 5, 7)),
    TokenLayout((4, 5, 7), 9, "before"),
    TokenLayout((4, 5, 7), 9, "after", valid=(143, 149)),
    TokenLayout((1, 9, 16), 5, "before"),
    TokenLayout((5, 4, 7), 5, "before", prefix_frames=2),
]


def test_these_methods_are_static():
    assert {*SMALL, *WIDE} <= {name for name in list_methods() if method_class(name).is_static}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(WIDE))
def test_the_widest_setting_is_dense(name, layout):
    q, k, v = tensors(layout, batch=2)
    everything = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool)
    method = get_method(name, **WIDE[name])
    torch.testing.assert_close(attend(method, layout, q, k, v), masked(layout, q, k, v, everything))
    assert method.select(q, k, CallContext(layout)).density == pytest.approx(1)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", sorted(SMALL))
def test_attention_is_that_of_the_token_mask(name, layout):
    q, k, v = tensors(layout, batch=2)
    method = get_method(name, **SMALL[name])
    mask = token_mask(method, layout)
    # Methods whose unit is the frame see a whole image.
    assert mask.all() == (layout.frames == 1 and name in ("radial", "sink_recent"))
    assert mask[layout.text_slice()].all()
    assert mask[:, layout.text_slice()].all()
    torch.testing.assert_close(attend(method, layout, q, k, v), masked(layout, q, k, v, mask))


@pytest.mark.parametrize("frames", [1, 2, 5])
@pytest.mark.parametrize("name", [*sorted(SMALL), "svg", "vertical_slash", "re_ttention", "llsa"])
def test_conditioning_frames_are_seen_by_all_and_change_nothing_else(name, frames):
    grid, leading = (5, 4, 7), frames * 28
    sampled = {"svg": {"block": 8}, "vertical_slash": {"vertical": 1, "slash": 1, "near": 0, "block": 8}}
    sampled |= {"re_ttention": {"density": 0.2, "block": 8}, "llsa": {"block": 4, "keep": 2}}
    method = get_method(name, **{**SMALL, **sampled}[name])
    layout = TokenLayout(grid, prefix_frames=frames)
    order, plan = method.plan(layout, *tensors(layout)[:2])
    mask = plan.validate().to_token_mask()
    if order is not None:
        place = order.validate().inverse.expand(1, mask.shape[1], -1)
        mask = torch.stack([m[at][:, at] for m, at in zip(mask[0], place[0], strict=True)])[None]
    assert mask[..., :leading].all()
    if name in ("neighborhood", "clear", "sink_recent", "re_ttention"):  # exact rules, of which the prefix is no part
        assert torch.equal(mask[0, 0][:, leading:], token_mask(method, TokenLayout(grid))[:, leading:])


def test_causal_windows_let_conditioning_frames_see_no_more():
    method = get_method("neighborhood", window=(1, 1, 1), causal_frames=True, tile=(2, 2, 2))
    mask = token_mask(method, TokenLayout((4, 2, 3), prefix_frames=2))
    assert torch.equal(mask[:12, :12], torch.eye(12, dtype=torch.bool))
    assert mask[12:, :12].all()


@pytest.mark.parametrize("name", sorted(SMALL))
def test_padding_and_large_logits(name):
    layout = TokenLayout((3, 4, 5), 9, "after", valid=(63,))
    q, k, v = tensors(layout)
    method = get_method(name, **SMALL[name])
    q, k = 30 * q, 30 * k
    out = attend(method, layout, q, k, v)[:, :, :63]
    q[:, :, 63:], k[:, :, 63:], v[:, :, 63:] = -99.0, 99.0, torch.nan
    assert torch.equal(attend(method, layout, q, k, v)[:, :, :63], out)
    assert out.isfinite().all()


grids = st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 9))


@settings(max_examples=25, deadline=None)
@given(grids, st.sampled_from(["none", "before", "after"]), st.integers(1, 9), st.sampled_from(sorted(SMALL)))
def test_any_grid_makes_a_valid_plan(grid, position, text, name):
    layout = TokenLayout(grid, 0 if position == "none" else text, position)
    method, call = get_method(name, **SMALL[name]), CallContext(layout)
    plan = method.select(None, None, call).validate()
    assert plan.q_blocks.tokens == plan.k_blocks.tokens == layout.tokens
    order = method.order(None, None, None, call)
    if order is not None:
        order.validate()
        assert torch.equal(order.query[layout.text_slice()], torch.arange(layout.tokens)[layout.text_slice()])


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that is made."""

    found = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.found = max(self.found, x.untyped_storage().nbytes())
        return out


REAL = {"radial": {"density": 0.3}, "grat": {"density": 0.3}, "clear": {"radius": 12.0}, "svg": {}}


@pytest.mark.parametrize("name", sorted({*SMALL, *REAL}))
def test_a_plan_of_118800_tokens_needs_memory_for_pairs_of_blocks_and_never_of_tokens(name):
    layout = TokenLayout((33, 45, 80))
    method, call = get_method(name, **REAL.get(name, {})), CallContext(layout)
    tracemalloc.start()
    with Largest() as largest:
        if name == "svg":  # its plans are made once and shared, whatever its heads are called
            plan = method.plan_of_kinds(layout)
        else:
            method.order(None, None, None, call)
            plan = method.select(None, None, call)
    by_numpy = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    pairs = plan.counts.shape[1] * plan.q_blocks.count * plan.k_blocks.count
    assert plan.counts.shape[:2] == (1, 2 if name == "svg" else 1)
    assert plan.indices.numel() <= pairs
    assert plan.density < 0.7
    assert largest.found <= 8 * pairs + 64 * layout.tokens  # an int64 per pair of blocks, some numbers per token
    assert by_numpy <= 16 * pairs + 64 * layout.tokens
    assert 24 * pairs < layout.tokens**2 / 40


def test_layers_and_branches_share_one_plan():
    planner, method, record = Planner(Schedule()), get_method("sliding_tile"), CallRecord("", 0, 0, "", 0, "", None)
    layout = TokenLayout((4, 8, 8))
    found = {
        id(
            planner.plan(
                PlanRequest(method, layer, layout, RunState(layout.grid, 0, 1.0, branch)), tensors(layout), record
            )[0]
        )
        for layer in range(3)
        for branch in ("cond", "uncond")
    }
    assert len(found) == 1


def test_float64_is_exact():
    layout = TokenLayout((3, 5, 7))
    q, k, v = (x.double() for x in tensors(layout))
    for name, parameters in SMALL.items():
        method = get_method(name, **parameters)
        got = attend(method, layout, q, k, v, "reference")
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=token_mask(method, layout))
        torch.testing.assert_close(got, expected, atol=1e-12, rtol=1e-12)
