"""What the tests of the dynamic methods share: tensors, layouts, and attention by a method."""

from __future__ import annotations

import torch

from dit_accel.layout import TokenLayout
from dit_accel.state import CallContext

LAYOUTS = {
    "video": TokenLayout((3, 5, 7)),
    "text after": TokenLayout((3, 5, 7), 11, "after", (116, 109)),
    "text before": TokenLayout((3, 5, 7), 11, "before"),
    "one block and one token": TokenLayout((1, 3, 11)),
    "one block less one token": TokenLayout((1, 1, 31)),
}


def tensors(layout, batch=2, heads=2, dim=16, seed=0):
    """q, k, v that vary smoothly over the grid, with noise."""
    generator = torch.Generator().manual_seed(seed)
    field = torch.randn(3, batch, heads, 3, dim, generator=generator)
    x = torch.randn(3, batch, heads, layout.tokens, dim, generator=generator)
    x[..., layout.video_slice(), :] *= 0.5
    x[..., layout.video_slice(), :] += torch.sin(layout.coordinates.float() / 2 @ field)
    return tuple(x.unbind(0))


def attend(method, layout, q, k, v, call=None, backend="torch"):
    call = CallContext(layout) if call is None else call
    order, plan = method.plan(layout, q, k, v, call)
    ordered = (q, k, v) if order is None else order.validate().apply(q, k, v)
    out = method.compute(*ordered, plan.validate(), call, backend=backend)
    return out if order is None else order.restore(out)


def dense(layout, q, k, v):
    mask = None
    if layout.valid is not None:
        mask = torch.arange(layout.tokens) < torch.tensor(layout.valid)[:, None, None, None]
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def video_mask(method, layout, q, k, call=None):
    """Block mask of the plan, bool `[B, H, nq, nk]`."""
    return method.plan(layout, q, k, None, call)[1].validate().to_mask()
