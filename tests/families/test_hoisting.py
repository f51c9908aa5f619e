"""An order that all layers share is applied once per pass: the same result, and nothing left to the layers."""

from __future__ import annotations

import pytest
import torch
from captured import captured, run

import dit_accel
from dit_accel.errors import UnsupportedError
from dit_accel.families.hoisting import permute_tokens
from dit_accel.hoisting import common_order
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.order import TokenOrder, relative, video_order
from dit_accel.state import CallContext

HOISTED = ["wan2.1-t2v", "wan2.1-vace", "wan2.2-ti2v-5b-i2v", "hunyuan-video", "flux1-kontext", "cogvideox-5b"]
TILES = {"method": "sliding_tile", "tile": [2, 2, 2], "break_even": 1.0}


def orders(acc):
    """What each static plan of the transformer still does to the order of its tokens."""
    return [planned.order for planned in acc.engines["transformer"]._planner._static.values()]


@pytest.mark.parametrize("name", HOISTED)
def test_a_pass_in_tiles_equals_stock_and_leaves_nothing_behind(name):
    model, values = captured(name)
    stock = run(model, values)
    with dit_accel.accelerate(model, **TILES, window=[0, 0, 0]) as acc:
        torch.testing.assert_close(run(model, values), stock, atol=2e-5, rtol=1e-4)
        assert acc.report().dense_reasons == {}
        assert orders(acc) == [None]
        assert "from the first block to the last" in acc.summary()
        first, *others = acc.report().calls
        assert first.milliseconds("order") > 0
        assert all(call.milliseconds("order") == 0 for call in others)
    assert torch.equal(run(model, values), stock)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", [*HOISTED, "hunyuan-video-i2v", "flux2-dev"])
def test_windows_and_dense_layers_are_those_of_an_order_per_layer(name):
    model, values = captured(name)
    found = []
    for hoist in (True, False):
        with dit_accel.accelerate(model, **TILES, window=[1, 1, 3], dense_layers=1, hoist=hoist) as acc:
            found.append(run(model, values))
            assert acc.report().density < 1
            assert (orders(acc) == [None]) == (hoist and name in HOISTED)
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


CHOOSING = [
    {"method": "composed", "order": "bisect", "tile": [1, 2, 2], "block": 4, "density": 0.5, "about": "query"},
    {"method": "composed", "tile": [1, 2, 2], "density": 0.4, "remainder": "drop", "refresh": 2},
    {"method": "psa", "order": "tile", "tile": [1, 2, 2], "dense_steps": 1, "search_steps": [0]},
]


@pytest.mark.parametrize("settings", CHOOSING, ids=lambda settings: settings.get("order", settings["method"]))
def test_methods_that_choose_by_content_in_a_fixed_order_are_those_of_an_order_per_layer(settings):
    model, values = captured("wan2.1-t2v")
    found = []
    for hoist in (True, False):
        with dit_accel.accelerate(model, **settings, break_even=1.0, dense_layers=1, hoist=hoist) as acc:
            times = (torch.full_like(values["timestep"], time) for time in (900, 600))
            found.append(torch.stack([run(model, {**values, "timestep": time}) for time in times]))
            assert acc.report().density < 1
            assert acc.engines["transformer"].standing.is_hoisted == hoist
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_a_step_cache_sees_one_order_in_dense_and_sparse_steps():
    from diffusers import FirstBlockCacheConfig

    model, values = captured("wan2.1-t2v")
    found = []
    for hoist in (True, False):
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        with dit_accel.accelerate(model, **TILES, window=[1, 1, 1], dense_steps=1, hoist=hoist):
            steps = []
            for time in (900, 600, 300):
                with model.cache_context("cond"):
                    steps.append(run(model, {**values, "timestep": torch.full_like(values["timestep"], time)}))
        model.disable_cache()
        found.append(torch.stack(steps))
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_an_adapter_that_wraps_a_port_later_is_followed():
    from peft import LoraConfig

    model, values = captured("wan2.1-t2v")
    found = []
    for hoist in (True, False):
        with dit_accel.accelerate(model, **TILES, window=[1, 1, 1], hoist=hoist) as acc:
            plain = run(model, values)
            torch.manual_seed(0)
            model.add_adapter(LoraConfig(r=2, target_modules=["proj_out", "patch_embedding"], init_lora_weights=False))
            found.append(run(model, values))
            assert not torch.allclose(plain, found[-1], atol=1e-3)
            assert (orders(acc) == [None]) == hoist
        model.delete_adapters("default")
        model.unload_lora()
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_heads_of_a_table_with_one_tile_share_the_order():
    model, values = captured("wan2.1-t2v")
    layers, heads = len(model.blocks), model.config.num_attention_heads
    window = {"method": "sliding_tile", "parameters": {"window": [1, 1, 3], "tile": [2, 2, 2]}}
    modes = {"near": window, "own": {}, "full": {"method": "dense"}, "none": {"method": "skip"}}
    rows = [[("near", "own", "full", "none")[(layer + head) % 4] for head in range(heads)] for layer in range(layers)]
    found = []
    for hoist in (True, False):
        table = {"modes": modes, "heads": rows}
        with dit_accel.accelerate(model, **TILES, window=[1, 1, 1], head_table=table, hoist=hoist) as acc:
            found.append(run(model, values))
            assert acc.engines["transformer"].standing.is_hoisted == hoist
    torch.testing.assert_close(found[0], found[1], atol=2e-5, rtol=1e-4)


def test_a_layer_with_a_processor_of_its_own_finds_the_raster():
    model, values = captured("wan2.1-t2v")
    seen = []

    class Watch:
        def __init__(self, ours):
            self.ours = ours

        def __call__(self, attn, hidden_states, *args, **kwargs):
            seen.append(hidden_states)
            return self.ours(attn, hidden_states, *args, **kwargs)

    for hoist in (True, False):
        with dit_accel.accelerate(model, **TILES, window=[1, 1, 1], hoist=hoist):
            first = model.blocks[0].attn1
            ours = first.processor
            first.set_processor(Watch(ours))
            run(model, values)
            first.set_processor(ours)
    assert torch.equal(*seen)


def test_tokens_that_leave_without_having_entered_are_refused():
    model, values = captured("wan2.1-t2v")
    with dit_accel.accelerate(model, **TILES, window=[1, 1, 1]):
        run(model, values)
        model.rope._forward_hooks.clear()
        with pytest.raises(UnsupportedError, match=r"rope.*hoist=False"):
            run(model, values)


LAYOUT = TokenLayout((3, 4, 6))


def test_methods_agree_on_an_order_or_there_is_none():
    tiles = [get_method("sliding_tile", tile=(1, 2, 2)), get_method("grat", tile=(1, 2, 2)), get_method("dense")]
    index = common_order(tiles, LAYOUT)
    assert torch.equal(video_order(LAYOUT, index).query, tiles[0].order(None, None, None, CallContext(LAYOUT)).query)
    for other in (
        get_method("sliding_tile", tile=(1, 2, 3)),  # another order
        get_method("radial"),  # the raster
        get_method("svg"),  # an order per head
        get_method("neighborhood", tile=(1, 2, 2), key_tile=(1, 1, 4)),  # keys stand otherwise
    ):
        assert common_order([*tiles, other], LAYOUT) is None
    chosen = [get_method("composed", tile=[1, 2, 2]), get_method("psa", order="tile", tile=[1, 2, 2])]
    assert torch.equal(common_order([*tiles, *chosen], LAYOUT), index)
    for by_content in (
        get_method("composed", order="kmeans"),
        get_method("composed", order="axes", axes=["fhw", "hwf"]),
    ):
        assert common_order([by_content], LAYOUT) is None
    assert common_order([get_method("radial"), get_method("a_shape")], LAYOUT) is None
    assert common_order([get_method("dense")], LAYOUT) is None


def test_relative_orders_take_tokens_from_where_they_stand():
    generator = torch.Generator().manual_seed(0)
    standing = TokenOrder(torch.randperm(20, generator=generator))
    x = torch.randn(2, 3, 20, 4, generator=generator)
    here = standing.apply(x, x, x)[0]
    per_head = TokenOrder(torch.stack([torch.randperm(20, generator=generator) for _ in range(6)]).view(2, 3, 20))
    apart = TokenOrder(torch.randperm(20, generator=generator), torch.randperm(20, generator=generator))
    for order in (None, per_head, apart):
        wanted = (x, x, x) if order is None else order.apply(x, x, x)
        step = relative(order, standing).validate()
        assert all(torch.equal(a, b) for a, b in zip(step.apply(here, here, here), wanted, strict=True))
        assert torch.equal(step.restore(wanted[0]), here)
    assert relative(TokenOrder(standing.query.clone()), standing) is None


def test_tokens_of_any_axes_are_permuted_and_text_before_them_stays():
    index = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    grid = torch.arange(48).view(1, 2, 2, 3, 4)
    assert torch.equal(permute_tokens(grid, 2, index).flatten(2), grid.flatten(2)[:, :, index])
    joint = torch.arange(30).view(1, 30, 1)
    assert torch.equal(permute_tokens(joint, 1, index)[0, :, 0], torch.cat([torch.arange(6), 6 + index]))
