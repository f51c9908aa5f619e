"""Orders by content: conditioning frames are attended by all, and their keys stand together."""

from __future__ import annotations

import pytest
import torch
from method_cases import attend, tensors
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders.kept import KeptOrder, PackedIndex
from dit_accel.state import CallContext

BLOCK = 16
CASES = {
    "kmeans": ("composed", {"order": "kmeans", "clusters": 8, "remainder": "drop"}),
    "aurora": ("aurora", {"query_block": BLOCK}),
    "lsh": ("composed", {"order": "lsh"}),
    "hot keys": ("composed", {"order": "hot_keys"}),
    "hottest first": ("composed", {"order": "hot_keys", "hot_share": 0.3}),
    "in segments": ("pbs", {"segment": 24, "mass": None}),
    "svg2": ("svg2", {"query_clusters": 6, "key_clusters": 6}),
}
LAYOUTS = [
    TokenLayout((5, 4, 7), prefix_frames=1),
    TokenLayout((5, 4, 7), 11, "before", prefix_frames=2),
    TokenLayout((5, 4, 7), 11, "after", (151, 143), prefix_frames=2),
    TokenLayout((3, 4, 7), prefix_frames=3),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_all_attend_conditioning_frames_in_few_blocks(name, layout):
    chosen, parameters = CASES[name]
    method = get_method(chosen, block=BLOCK, density=0.2, **parameters)
    q, k, v = tensors(layout, batch=2, dim=8)
    order, plan = method.plan(layout, q, k, v)
    order.validate()
    keys = order.key_index.expand(2, 2, -1)
    frames = torch.arange(layout.tokens) - layout.video_start
    conditioning = ((frames >= 0) & (frames < layout.prefix))[keys]
    mask = plan.validate().to_token_mask().expand(2, 2, -1, -1)
    assert mask.transpose(-1, -2)[conditioning].all()
    if layout.prefix_frames < layout.frames:
        holding = plan.k_blocks.block_of_token()[conditioning[0, 0].nonzero().flatten()].unique()
        assert len(holding) <= layout.prefix // BLOCK + 2
        assert plan.density < 1


@pytest.mark.parametrize("name", CASES)
def test_full_density_is_dense(name):
    chosen, parameters = CASES[name]
    layout = LAYOUTS[1]
    q, k, v = tensors(layout, batch=2, dim=8)
    out = attend(get_method(chosen, block=BLOCK, density=1.0, **parameters), layout, q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("share", [0.3, 0.6])
def test_hot_keys_in_front_are_forced_behind_text(share):
    """Blocks of text are forced anyway: those of the hot keys stand behind them."""
    layout = TokenLayout((4, 4, 8), 20, "before")
    method = get_method("composed", order="hot_keys", hot_share=share, block=BLOCK, density=0.01)
    plan = method.plan(layout, *tensors(layout))[1]
    text = plan.k_blocks.starts[:-1] < 20
    forced = plan.to_mask().all(0).all(0).all(0)
    assert forced[text].all()
    assert int(forced[~text].sum()) == int(share * 128) // BLOCK
    assert forced[~text][: int(share * 128) // BLOCK].all()


@pytest.mark.parametrize("tokens", [1, 7, 4097, 65536, 65537, 75600, 131073, 300001])
def test_a_packed_permutation_comes_back(tokens):
    generator = torch.Generator().manual_seed(tokens)
    index = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(2)]).unsqueeze(0)
    packed = PackedIndex.of(index)
    assert torch.equal(packed.unpacked(), index)
    bits = max(0, (tokens - 1).bit_length() - 16)
    assert packed.bytes == 2 * (2 * tokens + bits * -(-tokens // 8))


def test_a_kept_order_is_for_the_same_tokens_alone():
    layout = TokenLayout((5, 4, 7), prefix_frames=1)
    method, q = get_method("aurora", block=BLOCK, query_block=BLOCK), tensors(layout)
    call = CallContext(layout, step=3)
    order = method.order(*q, call)
    kept: KeptOrder = call.branches["order"]
    assert torch.equal(kept.order.query, order.query)
    assert torch.equal(kept.order.key_index, order.key_index)
    assert kept.serves(q[0], CallContext(layout, step=6), 4)
    assert not kept.serves(q[0], CallContext(layout, step=7), 4)
    assert not kept.serves(q[0], CallContext(TokenLayout((5, 4, 7)), step=3), 4)
    assert not kept.serves(q[0][:, :1], CallContext(layout, step=3), 4)
