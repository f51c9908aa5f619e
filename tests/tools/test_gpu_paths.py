"""What runs in Triton on a GPU, told without one: presets by their reasons, the default method launch by launch."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from host_waits import device_without_memory
from preset_cases import pipeline_of

from dit_accel import acceleration
from dit_accel.acceleration import _check_arithmetic, accelerate
from dit_accel.errors import UnsupportedError
from dit_accel.kernels import Precision, triton_backend
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
    declined, fp8 = {}, set()
    for (dim, remainder, precision), name in requests_of_presets().items():
        request = Request(
            torch.device("cuda"), torch.bfloat16, dim, has_predicate=True, remainder=remainder, precision=precision
        )
        fp8 |= {name} if precision is not None and precision.pv == "fp8" else set()
        reason = triton_backend.BACKEND.why_not(request)
        if reason is not None:
            declined[name] = reason
    assert len(requests_of_presets()) > 5
    assert fp8
    if capability >= (8, 9):
        assert not declined
        return
    assert set(declined) == fp8
    assert set(declined.values()) == {
        "compute capability 8.0 multiplies nothing in float8_e4m3fn, 8.9 does; 'int8' runs on both"
    }


class OnGpu(torch.nn.Module):
    """A model whose weights say that they lie on a GPU."""

    def parameters(self, recurse=True):
        yield type("Weight", (), {"device": torch.device("cuda")})()


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_arithmetic_that_a_gpu_lacks_is_refused_before_the_first_step(monkeypatch, backend):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    fp8, int8 = (get_method("sparge", precision=name) for name in ("int8_fp8", "int8"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 6))
    with pytest.raises(
        UnsupportedError, match=r"method 'sparge' .* cuda lacks: .*triton: compute capability 8.6 .*int8"
    ):
        _check_arithmetic([fp8], OnGpu(), backend)
    _check_arithmetic([int8], OnGpu(), backend)
    _check_arithmetic([fp8], torch.nn.Linear(2, 2), backend)  # a CPU emulates it
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 9))
    _check_arithmetic([fp8], OnGpu(), backend)


def test_accelerate_asks_for_the_arithmetic_of_every_transformer(monkeypatch):
    asked = []
    monkeypatch.setattr(acceleration, "_check_arithmetic", lambda *given: asked.append(given))
    pipe = pipeline_of(load_preset("wan2.2-t2v-a14b-480p").tiny)
    with accelerate(pipe, method="sparge", precision="int8_fp8"):
        pass
    assert [model for _, model, _ in asked] == [pipe.transformer, pipe.transformer_2]
    assert {method.precision for methods, _, _ in asked for method in methods} == {Precision("int8", pv="fp8")}


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
