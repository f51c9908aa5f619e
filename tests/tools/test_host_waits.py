"""Choosing blocks does not make the host wait for the device: kernels are launched ahead of it."""

from __future__ import annotations

import pytest
import torch
from host_waits import HostWait, device_without_memory

from dit_accel.kernels import triton_backend
from dit_accel.kernels.spec import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method, list_methods
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.selection import Threshold, TopK, TopP, select_plan
from dit_accel.state import CallContext

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

# What has to be known on the host by its nature.
WAITS = {"svg2": "k-means goes on until its centroids rest, which the host looks at"}
# It sums the rows of a few queries along lines, in torch.
IN_TORCH = {"vertical_slash"}
DYNAMIC = sorted(name for name in list_methods() if not get_method(name).is_static)
VARIANTS = [
    *((name, {}) for name in DYNAMIC if name not in WAITS),
    *(("composed", {"score": score}) for score in ("antidiagonal", "subblock", "covariance", "error")),
    ("composed", {"scope": "layer", "touching": True}),
    ("composed", {"mass": 0.9, "density": None, "order": "raster"}),
    ("composed", {"tau": 0.5, "density": None, "noise": 0.1}),
    ("composed", {"heads": "adaptive", "sink_frames": 1}),
    ("sparge", {"density": None, "similarity": 0.2}),
    ("flexprefill", {"least": 0.1, "sink_frames": 1}),
    ("xattention", {"threshold": (0.8, 0.9, 0.95)}),
    ("asa", {"order": "raster", "padding": "repeat"}),
    ("vmoba", {"sink_frames": 1}),
]
LAYOUTS = [
    TokenLayout((5, 10, 24)),
    TokenLayout((5, 10, 24), 40, "after", (1220,)),
    TokenLayout((5, 10, 24), 40, "before", prefix_frames=1),
]


def on_device(layout):
    return [torch.empty(1, 3, layout.tokens, 64, dtype=torch.bfloat16, device="meta") for _ in range(3)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=["video", "padded text after", "text before"])
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_a_plan_is_made_and_used_without_a_wait(monkeypatch, name, parameters, layout):
    method, (q, k, v) = get_method(name, **parameters), on_device(layout)
    with device_without_memory(monkeypatch) as launches:
        order, plan = method.plan(layout, q, k, v, CallContext(layout))
        if order is not None:
            q, k, v = order.to("meta").apply(q, k, v)
        made = len(launches)
        kv_len = layout.valid_lengths(q.device)
        triton_backend.run(q, k, v, AttentionCall(plan, 0.125, method.remainder, method.precision, kv_len))
    assert plan.indices.device.type == "meta"
    assert made or name in IN_TORCH, "no kernel of this package took part"
    assert len(launches) > made


@pytest.mark.parametrize("name", WAITS)
def test_the_methods_that_wait_are_those_that_must(monkeypatch, name):
    with device_without_memory(monkeypatch), pytest.raises((HostWait, NotImplementedError)):
        get_method(name).plan(LAYOUTS[0], *on_device(LAYOUTS[0]), CallContext(LAYOUTS[0]))


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool((x > 0).any()),
        lambda x: (x > 0).nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.arange(2)],
        lambda x: torch.equal(x, x),
        lambda x: x.cpu(),
        lambda x: torch.arange(4).to(x.device),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: x.copy_(torch.zeros(4)),
        lambda x: torch.repeat_interleave(x.long()),
        lambda x: BlockPlan.from_mask(x.expand(2, 4) > 0, Blocking.uniform(2, 1), Blocking.uniform(4, 1)),
    ],
)
def test_every_way_to_wait_is_seen(monkeypatch, ask):
    with device_without_memory(monkeypatch), pytest.raises((HostWait, NotImplementedError)):
        ask(torch.zeros(4, device="meta"))


def test_long_lists_are_cut_to_the_longest_row_for_which_the_host_waits(monkeypatch):
    """What the lists of the plans of all layers take matters more than a wait beside so long a call."""
    blocks = Blocking.uniform(4096, 1)
    mask = torch.zeros(1, 1, 4096, 4096, dtype=torch.bool, device="meta")
    with device_without_memory(monkeypatch):
        assert BlockPlan.from_mask(mask, blocks, blocks, longest=1024).indices.shape[-1] == 1024
        with pytest.raises((HostWait, NotImplementedError)):
            BlockPlan.from_mask(mask, blocks, blocks, longest=1025)


@pytest.mark.parametrize("text", [0, 5])
@pytest.mark.parametrize(
    "budget",
    [
        TopK(share=0.3),
        TopK(count=4),
        TopK(share=torch.tensor([0.1, 0.6]), rounding="ceil"),
        TopK(share=0.1, least=0.35, rounding="plus_one"),
        TopK("layer", share=0.2),
        TopP(mass=0.7, most=0.4),
        Threshold(tau=-3.0),
    ],
    ids=str,
)
def test_rows_are_no_longer_than_what_is_known_before_any_score_is(monkeypatch, budget, text):
    """The bound that stands in for the wait holds, is reached where rows are full, and changes no plan."""
    layout = TokenLayout((2, 4, 8), text, "after" if text else "none", (60,))
    blocks, seen = layout.blocks(8), []
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, 2, blocks.count, blocks.count, generator=generator)
    forced = torch.rand(blocks.count, blocks.count, generator=generator) < 0.3
    beside = torch.rand(blocks.count, blocks.count, generator=generator) < 0.1
    real = BlockPlan.from_mask

    def watched(mask, *arguments, longest=None):
        seen.append(longest)
        return real(mask, *arguments)

    monkeypatch.setattr(BlockPlan, "from_mask", watched)
    for extra in ({}, {"forced": forced}, {"beside": beside}):
        plan = select_plan(scores, budget, blocks, blocks, layout, **extra)
        longest = int(plan.counts.max())
        assert longest <= seen[-1] <= blocks.count
        if not extra and isinstance(budget, TopK) and budget.scope == "row" and not text:
            assert seen[-1] == longest
    wide = real(plan.to_mask(), blocks, blocks, longest=None)
    assert torch.equal(wide.to_mask(), plan.to_mask())
