"""What must be true of every method that scores blocks."""

from __future__ import annotations

import dynamic_cases as cases
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_accel.engine import Engine
from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.dynamic import BlockSelection, DynamicMethod
from dit_accel.methods.registry import get_method, list_methods, method_class
from dit_accel.schedule import Schedule
from dit_accel.state import CallContext, RunState

METHODS = [name for name in list_methods() if issubclass(method_class(name), BlockSelection)]
TILED = [name for name in METHODS if issubclass(method_class(name), DynamicMethod)]
# Methods whose scores estimate the attention mass, so that recall can be read from them.
MASS = set(METHODS) - {"asa", "flexprefill", "vmoba"}
CASES = [(name, 32) for name in METHODS] + [(name, [2, 2, 4]) for name in TILED]


def make(name, blocks, **parameters):
    """A method on blocks of `blocks` tokens, or on tiles, under which any density may be asked for."""
    fields = method_class(name).model_fields
    if isinstance(blocks, list):
        parameters |= {"order": "tile", "tile": blocks}
    else:
        parameters |= {key: blocks for key in ("block", "key_block", "query_block") if key in fields}
        parameters |= {"order": "raster"} if "order_" in fields else {}
    if name == "vmoba":
        parameters |= {"frames": 1, "window": [2, 4], "box": [2, 2, 4]}
    if name == "sparge":
        parameters.setdefault("similarity", -1.0)
    return get_method(name, **parameters)


@pytest.mark.parametrize("layout", cases.LAYOUTS.values(), ids=cases.LAYOUTS.keys())
@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_full_density_is_dense_attention(name, blocks, layout):
    q, k, v = cases.tensors(layout)
    out = cases.attend(make(name, blocks, density=1.0), layout, q, k, v)
    torch.testing.assert_close(out, cases.dense(layout, q, k, v), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(("name", "blocks"), CASES)
def test_padding_changes_nothing_and_batch_rows_do_not_mix(name, blocks):
    layout = cases.LAYOUTS["text after"]
    q, k, v = cases.tensors(layout)
    method = make(name, blocks, density=0.3)
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


@pytest.mark.parametrize("leading", ["sink", "conditioning"])
@pytest.mark.parametrize("name", METHODS)
def test_text_and_the_first_frames_are_kept(name, leading):
    layout = TokenLayout((4, 4, 8), 9, "before", prefix_frames=int(leading == "conditioning"))
    q, k, v = cases.tensors(layout)
    method = make(name, 16, density=0.05, sink_frames=int(leading == "sink"))
    order, plan = method.plan(layout, q, k, v)
    mask, (rows, columns) = plan.validate().to_mask(), method.blocks(layout)
    assert mask[..., layout.text_blocks(columns)].all()
    assert mask[:, :, layout.text_blocks(rows)].all()
    token = (torch.arange(layout.tokens) if order is None else order.key_index).expand(2, 2, -1)
    first = (token >= layout.video_start) & (token < layout.video_start + layout.frame_tokens)
    for item, head in ((0, 0), (1, 1)):
        sink = columns.block_of_token()[first[item, head]].unique()
        assert mask[item, head][:, sink].all()
    assert mask.float().mean() < 0.8


@pytest.mark.parametrize("name", TILED)
def test_the_own_block_is_an_option(name):
    layout = TokenLayout((4, 4, 8))
    q, k, _ = cases.tensors(layout)
    kept, free = (cases.video_mask(make(name, 16, density=0.15, keep_self=s), layout, q, k) for s in (True, False))
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    assert torch.equal(kept.sum(-1), free.sum(-1))


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_gives_the_same_plan_and_noise_is_an_option(name):
    layout = cases.LAYOUTS["video"]
    q, k, _ = cases.tensors(layout)
    plain = make(name, 8, density=0.6)
    assert torch.equal(cases.video_mask(plain, layout, q, k), cases.video_mask(plain, layout, q, k))
    noisy = make(name, 8, density=0.6, noise=0.5)
    first, again, other = (cases.video_mask(noisy, layout, q, k, CallContext(layout, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", METHODS)
def test_adaptive_heads_keep_the_mean_density(name):
    layout = TokenLayout((4, 8, 8))
    q, k, _ = cases.tensors(layout, batch=1, heads=4)
    q = q * torch.tensor([40.0, 0.1, 40.0, 0.1]).view(1, 4, 1, 1)
    widths = {}
    for heads in ("uniform", "adaptive"):
        plan = make(name, 8, density=0.25, heads=heads).plan(layout, q, k)[1]
        widths[heads] = plan.density_per_head()[0]
    assert widths["uniform"].max() - widths["uniform"].min() < 1e-9
    assert float(widths["adaptive"].mean()) == pytest.approx(float(widths["uniform"].mean()), abs=0.02)
    if name in MASS:
        assert widths["adaptive"][0] < widths["adaptive"][1]


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_gives_the_plan_of_its_values_in_single(name):
    layout = TokenLayout((2, 8, 8))
    q, k, _ = (x.bfloat16() for x in cases.tensors(layout))
    method = make(name, 8, density=0.3)
    assert torch.equal(cases.video_mask(method, layout, q, k), cases.video_mask(method, layout, q.float(), k.float()))


class Elements(TorchDispatchMode):
    """Watches every tensor that is made, and remembers how many elements the largest had."""

    most = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.most = max([self.most, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize("name", METHODS)
def test_nothing_of_the_size_of_all_pairs_of_tokens_is_made(name):
    layout = TokenLayout((8, 32, 32), 16, "after")
    q, k, v = torch.randn(3, 1, 1, layout.tokens, 8, generator=torch.Generator().manual_seed(0)).unbind(0)
    with Elements() as elements:
        plan = get_method(name, density=0.1).plan(layout, q, k, v)[1]
    assert plan.density < 0.5 or name == "sparge"  # whose gate does not trust means of noise
    assert layout.tokens * 8 <= elements.most < layout.tokens**2 / 16


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ConfigError, match="set density as well"):
        get_method("xattention", heads="adaptive")
    with pytest.raises(ConfigError, match="key_block goes with"):
        get_method("sparge", order="tile", key_block=32)
    method = get_method("sparge", order="tile")
    assert get_method("sparge", **method.model_dump(exclude_unset=True)) == method


def generate(engine, module, branches, generation):
    """Outputs of two steps of every branch, whose tensors differ by branch and step."""
    layout, outs = TokenLayout((2, 4, 8)), {}
    for step in range(2):
        for branch in branches:
            engine.begin(RunState(layout.grid, step, 1 - step / 2, branch, generation=generation))
            seed = 10 * step + len(branch)
            q, k, v = (x.transpose(1, 2) for x in cases.tensors(layout, batch=1, seed=seed))
            outs[branch, step] = engine.attend(module, q, k, v, dense=lambda: None)
    return outs


@pytest.mark.parametrize("name", METHODS)
def test_nothing_leaks_between_generations_or_branches(name):
    module = nn.Identity()
    engine = Engine(make(name, 8, density=0.4), Schedule.make(), [module], break_even=1.0, seed=3)
    first = generate(engine, module, ("cond", "uncond"), 0)
    again = generate(engine, module, ("cond", "uncond"), 1)
    alone = generate(Engine(engine.method, Schedule.make(), [module], break_even=1.0, seed=3), module, ("uncond",), 0)
    for at, out in first.items():
        assert torch.equal(out, again[at])
    for at, out in alone.items():
        assert torch.equal(out, first[at])
    assert all(call.reason is None and call.milliseconds("select") > 0 for call in engine.calls)
