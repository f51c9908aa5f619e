"""What must be true of every method that scores blocks."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.dynamic import DynamicMethod
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.state import CallContext

METHODS = [name for name in list_methods() if issubclass(method_class(name), DynamicMethod)]
ORDERS = [{"block": 32}, {"order": "tile", "tile": [2, 2, 4]}]


def options(name, order):
    """Parameters under which a method may be asked for any density."""
    return {**order, **({"similarity": -1.0} if name == "sparge" else {})}


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize("order", ORDERS, ids=["raster", "tile"])
@pytest.mark.parametrize("name", METHODS)
def test_full_density_is_dense_attention(name, order, layout):
    q, k, v = cases.tensors(layout)
    out = cases.attend(get_method(name, density=1.0, **options(name, order)), layout, q, k, v)
    torch.testing.assert_close(out, cases.dense(layout, q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("order", ORDERS, ids=["raster", "tile"])
@pytest.mark.parametrize("name", METHODS)
def test_padding_changes_nothing_and_batch_rows_do_not_mix(name, order):
    layout = cases.LAYOUTS["text after"]
    q, k, v = cases.tensors(layout)
    method = get_method(name, density=0.3, **options(name, order))
    out = cases.attend(method, layout, q, k, v)
    poisoned = [x.clone() for x in (q, k, v)]
    for x, poison in zip(poisoned, (-50.0, 50.0, torch.nan), strict=True):
        x[1, :, 109:] = poison
    torch.testing.assert_close(cases.attend(method, layout, *poisoned)[1, :, :109], out[1, :, :109])
    for item in range(2):
        alone = TokenLayout(layout.grid, layout.text, "after", (layout.valid[item],))
        rows = [x[item : item + 1] for x in (q, k, v)]
        length = layout.valid[item]
        torch.testing.assert_close(cases.attend(method, alone, *rows)[:, :, :length], out[item : item + 1, :, :length])


@pytest.mark.parametrize("name", METHODS)
def test_text_is_whole_and_the_sink_and_the_own_block_are_kept(name):
    layout = TokenLayout((4, 4, 8), 9, "before")
    q, k, _ = cases.tensors(layout)
    method = get_method(name, density=0.05, block=16, keep_self=True, sink_frames=1, **options(name, {}))
    mask = cases.video_mask(method, layout, q, k)
    _, columns = method.blocks(layout)
    text = layout.text_blocks(columns)
    assert mask[..., text].all()
    assert mask[:, :, 0].all()
    frame = (columns.starts[:-1] - layout.video_start) // 32
    assert mask[..., ~text & (frame < 1)].all()
    kept = cases.video_mask(get_method(name, density=0.3, block=16, key_block=16, **options(name, {})), layout, q, k)
    assert kept.float().mean() < 0.9


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_plan_and_noise_is_an_option(name):
    layout = cases.LAYOUTS["video"]
    q, k, _ = cases.tensors(layout)
    plain = get_method(name, density=0.4, block=8, key_block=8)
    assert torch.equal(cases.video_mask(plain, layout, q, k), cases.video_mask(plain, layout, q, k))
    noisy = get_method(name, density=0.4, block=8, key_block=8, noise=0.5)
    first, again, other = (cases.video_mask(noisy, layout, q, k, CallContext(layout, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", METHODS)
def test_adaptive_heads_keep_the_mean_density(name):
    layout = TokenLayout((4, 8, 8))
    q, k, _ = cases.tensors(layout, batch=1, heads=4)
    q = q * torch.tensor([40.0, 0.1, 40.0, 0.1]).view(1, 4, 1, 1)
    common = {"density": 0.25, "block": 8, "key_block": 8, **options(name, {})}
    widths = {}
    for heads in ("uniform", "adaptive"):
        plan = get_method(name, heads=heads, **common).plan(layout, q, k)[1]
        widths[heads] = plan.density_per_head()[0]
    assert widths["uniform"].max() - widths["uniform"].min() < 1e-9
    assert float(widths["adaptive"].mean()) == pytest.approx(float(widths["uniform"].mean()), abs=0.02)
    assert widths["adaptive"][0] < widths["adaptive"][1]


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_gives_the_plan_of_its_values_in_single(name):
    layout = TokenLayout((2, 8, 8))
    q, k, _ = (x.bfloat16() for x in cases.tensors(layout))
    method = get_method(name, density=0.3, block=8, key_block=8)
    assert torch.equal(cases.video_mask(method, layout, q, k), cases.video_mask(method, layout, q.float(), k.float()))


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="set density as well"):
        get_method("xattention", heads="adaptive")
    with pytest.raises(ConfigError, match="key_block goes with"):
        get_method("sparge", order="tile", key_block=32)
    method = get_method("sparge", order="tile")
    assert get_method("sparge", **method.model_dump(exclude_unset=True)) == method
