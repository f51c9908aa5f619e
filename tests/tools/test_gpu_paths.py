"""What runs in Triton on a GPU, told without one: presets by their reasons, the default method launch by launch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from host_waits import device_without_memory

from dit_accel.kernels import triton_backend
from dit_accel.kernels.registry import Request
from dit_accel.kernels.spec import AttentionCall
from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.orders import content
from dit_accel.presets import list_presets, load_preset
from dit_accel.state import CallContext

pytest.importorskip("triton", reason="Triton has wheels for Linux only")


@cache
def requests_of_presets():
    """What the methods of all presets ask of a backend, each once, with a preset that asks it."""
    found = {}
    for name in list_presets():
        preset = load_preset(name)
        method = get_method(preset.method.name, **preset.method.parameters)
        asked = (preset.model.head_dim, method.remainder, method.precision)
        found.setdefault(asked, name)
    return found


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)])
def test_the_attention_of_every_preset_runs_in_triton(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    declined = {}
    for (dim, remainder, precision), name in requests_of_presets().items():
        request = Request(
            torch.device("cuda"), torch.bfloat16, dim, has_predicate=True, remainder=remainder, precision=precision
        )
        reason = triton_backend.BACKEND.why_not(request)
        if reason is not None:
            declined[name] = reason
    assert len(requests_of_presets()) > 5
    assert not declined


@pytest.mark.parametrize("text", [0, 40])
@pytest.mark.parametrize(
    ("parameters", "ranking"), [({}, {"leading"}), ({"scope": "layer"}, {"digit_counts", "keep_leading"})]
)
def test_the_default_method_runs_in_triton_from_order_to_output(monkeypatch, text, parameters, ranking):
    layout = TokenLayout((9, 16, 24), text, "after" if text else "none")
    q, k, v = (torch.empty(1, 3, layout.tokens, 128, dtype=torch.bfloat16, device="meta") for _ in range(3))
    method = get_method("aurora", **parameters)
    monkeypatch.setattr(content, "drawn_centroids", lambda x, count, generator: x[:, :, :count])
    with device_without_memory(monkeypatch) as launches:
        order, plan = method.plan(layout, q, k, v, CallContext(layout))
        if order is not None:
            q, k, v = order.to("meta").apply(q, k, v)
        chosen = len(launches)
        out, lse = triton_backend.run(q, k, v, AttentionCall(plan, 128**-0.5, method.remainder, method.precision))
    assert (out.shape, lse.shape) == (q.shape, q.shape[:3])
    names = [made.kernel.__name__ for made in launches]
    # One pass over the queries and one over keys and values; a row is ranked in registers, a layer by counting.
    assert names[:chosen].count("statistics") == 2
    assert {"move_rows", "slot_scores", *ranking} <= set(names[:chosen])
    assert "attention" in names[chosen:]
