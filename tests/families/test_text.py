"""Text before, after, and absent: what layout a method is given, and that padding weighs nothing."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from captured import ONE_PER_TRANSFORMER, captured, run

import dit_accel
from dit_accel.layout import TokenLayout
from dit_accel.methods.composed import Composed
from dit_accel.state import RunState

LAYOUTS = {
    "wan2.1-t2v": TokenLayout((3, 4, 6)),
    "wan2.1-vace": TokenLayout((4, 4, 6)),
    "hunyuan-video": TokenLayout((3, 4, 6), 256, "after", (72 + 34,)),
    "hunyuan-video-i2v": TokenLayout((3, 4, 6), 396, "after", (72 + 186,), prefix_frames=1),
    "hunyuan-video-1.5": TokenLayout((3, 8, 12), 181, "after", (288 + 43,)),
    "hunyuan-video-1.5-i2v": TokenLayout((3, 6, 9), 181, "after", (162 + 43 + 49,)),
    "flux1-dev": TokenLayout((1, 8, 12), 512, "before"),
    "flux1-kontext": TokenLayout((2, 8, 12), 512, "before"),
    "flux2-dev": TokenLayout((1, 8, 12), 64, "before"),
    "flux2-dev-edit": TokenLayout((2, 16, 24), 64, "before"),
    "cogvideox-5b": TokenLayout((3, 4, 6), 226, "before"),
    "qwen-image": TokenLayout((1, 8, 12), 46, "before"),
    "ltx-video": TokenLayout((3, 8, 16)),
}


class Witness(Composed):
    """`composed` that notes the layouts it is given."""

    name: ClassVar[str] = "composed"
    seen: ClassVar[list[TokenLayout]] = []

    def select(self, q, k, call):
        self.seen.append(call.layout)
        return super().select(q, k, call)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layer_gives_the_layout_of_its_sequence(name):
    model, values = captured(name)
    expected = LAYOUTS[name]
    Witness.seen.clear()
    with dit_accel.accelerate(model, method=Witness(tile=(1, 2, 2)), break_even=1.0) as acc:
        run(model, values)
        assert len(Witness.seen) == len(acc.report().calls) > 0
    assert set(Witness.seen) == {expected}


@pytest.mark.parametrize("name", ONE_PER_TRANSFORMER)
def test_rows_of_a_batch_do_not_see_each_other(name):
    model, values = captured(name)
    other = {
        key: torch.randn_like(value) if key in ("hidden_states", "encoder_hidden_states") else value
        for key, value in values.items()
    }
    rows = len(values["hidden_states"])
    tensors = [key for key, value in values.items() if isinstance(value, torch.Tensor) and value.shape[:1] == (rows,)]
    both = values | {key: torch.cat([values[key], other[key]]) for key in tensors if not key.endswith("_ids")}
    with dit_accel.accelerate(model, method="composed", tile=[1, 2, 2], density=0.2, break_even=1.0) as acc:
        together = run(model, both)
        assert acc.report().dense_reasons == {}
        torch.testing.assert_close(together[:rows], run(model, values), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(together[rows:], run(model, other), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["hunyuan-video", "hunyuan-video-1.5"])
@pytest.mark.parametrize("method", ["dense", "composed", "radial"])
@pytest.mark.parametrize("valid", [(5,), (5, 9), (11, 11)])
def test_padding_text_weighs_exactly_nothing(name, method, valid):
    model, _ = captured(name)
    torch.manual_seed(0)
    attention = model.transformer_blocks[0].attn
    video, text = torch.randn(len(valid), 72, 32), torch.randn(len(valid), 11, 32)
    padding = torch.arange(11) >= torch.tensor(valid)[:, None]
    whole = torch.cat([torch.zeros(len(valid), 72, dtype=torch.bool), padding], 1)
    # The masks that the two models hand to their processors.
    mask = ~padding if name == "hunyuan-video-1.5" else ~whole[:, None, None]
    parameters = {} if method == "dense" else {"density": 0.4, "break_even": 1.0}
    outputs = []
    for junk in (0.0, 1e4):
        with dit_accel.accelerate(model, method=method, **parameters) as acc, torch.no_grad():
            acc.engines["transformer"].begin(RunState((3, 4, 6), 0, 1.0, batch=len(valid), text_valid=valid))
            outputs.append(attention(video, text.masked_fill(padding[..., None], junk), mask)[0])
            assert len(acc.report().dense_reasons) == int(method == "dense")
    assert torch.equal(*outputs)
    if method == "dense":
        for row, words in enumerate(valid):
            q, k, v = projected(attention, video[row : row + 1], text[row : row + 1, :words])
            alone = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)[:, :72]
            torch.testing.assert_close(outputs[0][row : row + 1], attention.to_out[0](alone), atol=1e-5, rtol=1e-4)


def projected(attention, video, text):
    """q, k, v `[B, H, N, D]` of a joint block without rotation."""
    names = (("to_q", "add_q_proj"), ("to_k", "add_k_proj"), ("to_v", "add_v_proj"))
    joint = []
    for (own, added), kind in zip(names, ("q", "k", None), strict=True):
        parts = [getattr(attention, own)(video), getattr(attention, added)(text)]
        parts = [part.unflatten(2, (attention.heads, -1)) for part in parts]
        if kind is not None:
            norms = (getattr(attention, f"norm_{kind}"), getattr(attention, f"norm_added_{kind}"))
            parts = [norm(part) for norm, part in zip(norms, parts, strict=True)]
        joint.append(torch.cat(parts, dim=1).transpose(1, 2))
    return joint
