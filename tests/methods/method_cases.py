"""What tests of methods share: tensors, a method on bare tensors, and the token mask that a plan computes."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from dit_accel.layout import TokenLayout
from dit_accel.methods.registry import get_method
from dit_accel.state import CallContext


def tensors(layout, batch=1, heads=2, dim=16, seed=0):
    """q, k, v `[B, H, N, D]`."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(batch, heads, layout.tokens, dim, generator=generator) for _ in range(3))


def attend(method, layout, q, k, v, backend="torch", call=None):
    """The method's output in raster order `[B, H, N, D]`."""
    call = CallContext(layout) if call is None else call
    order, plan = method.plan(layout, q, k, v, call)
    ordered = (q, k, v) if order is None else order.validate().apply(q, k, v)
    out = method.compute(*ordered, plan.validate(), call, backend=backend)
    return out if order is None else order.restore(out)


def masked(layout, q, k, v, mask):
    """Dense attention under a token mask `[..., N, N]`, padding left out: the specification of a method that drops."""
    if layout.valid is not None:
        real = torch.arange(layout.tokens) < torch.tensor(layout.valid).view(-1, 1, 1, 1)
        mask = mask & real
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def token_mask(method, layout):
    """The token mask that a static method computes, raster order, bool `[N, N]`."""
    call = CallContext(layout)
    order, plan = method.order(None, None, None, call), method.select(None, None, call).validate()
    mask = plan.to_token_mask()[0, 0]
    if order is None:
        return mask
    raster = torch.empty_like(mask)
    raster[order.query.unsqueeze(-1), order.query] = mask
    return raster


def video_mask(method, layout):
    """The part of `token_mask` between video tokens."""
    return token_mask(method, layout)[layout.video_slice(), layout.video_slice()]


def plan_of(name, grid, text=0, position="none", **parameters):
    """The plan of a static method."""
    return get_method(name, **parameters).select(None, None, CallContext(TokenLayout(grid, text, position)))
