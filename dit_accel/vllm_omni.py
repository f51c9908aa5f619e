"""The methods of this library as a sparse attention plug-in of vLLM-Omni.

vLLM-Omni looks for a callable in the entry-point group `vllm_omni.sparse_attn` and names it in its configuration::

    {"backend": "dit_accel", "params": {"method": "radial", "method_parameters": {"block": 128}, "dense_steps": 10}}
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_accel.errors import ConfigError, near_matches
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.methods.registry import get_method
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan
from dit_accel.state import CallContext

_log = logging.getLogger(__name__)
_OURS = ("method", "method_parameters", "dense_steps", "backend")
_SERVER = (
    "denoise_step_idx",
    "total_denoise_steps",
    "latent_shape",
    "patch_size",
    "total_latent_frames",
    "patches_per_frame",
    "kv_cache_dtype",
)


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    params: dict[str, Any],
    is_causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """Self-attention over video tokens in raster order.

    Every call stands alone: the server tells no layer and no guidance branch, so nothing is kept between calls but
    the plans of static methods. It advertises no `capabilities`, so that the server refuses masks itself. A call whose
    geometry the server does not publish, or whose sequence holds more than
    the video, runs dense and says so once.

    Args:
        query, key, value: `[B, N, H, D]`.
        params: "method" (default "composed"), "method_parameters" (its parameters), "dense_steps" (leading steps that
            run dense, default 0), "backend" (of `block_attention`, default "auto"), and what the server adds:
            `latent_shape`, `patch_size`, `denoise_step_idx`.
        is_causal: must be False.
        softmax_scale: factor on the logits. Default 1 / sqrt(D).

    Returns:
        `[B, N, H, D]`.

    Raises:
        ConfigError: causal attention, an unknown key, method or parameter.
    """
    if is_causal:
        raise ConfigError("is_causal", "the methods of dit_accel are bidirectional; choose a dense backend here")
    for name in params:
        if name not in _OURS + _SERVER:
            raise ConfigError(f"params.{name}", f"unknown key{near_matches(name, _OURS)}")
    chosen, parameters = params.get("method", "composed"), params.get("method_parameters") or {}
    method = get_method(chosen, **parameters)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    step = 0 if params.get("denoise_step_idx") is None else _first_int(params["denoise_step_idx"])
    layout = _layout(params, query.shape[1])
    if layout is None or method.name == "dense" or step < int(params.get("dense_steps", 0)):
        return F.scaled_dot_product_attention(q, k, v, scale=softmax_scale).transpose(1, 2)
    call = CallContext(layout, step=step)
    order, plan = _planned(method, call, q, k, v)
    ordered = (q, k, v) if order is None else order.apply(q, k, v)
    out = method.compute(*ordered, plan, call, softmax_scale, params.get("backend", "auto"))
    return (out if order is None else order.restore(out)).transpose(1, 2)


def _planned(method: Method, call: CallContext, q: Tensor, k: Tensor, v: Tensor) -> tuple[TokenOrder | None, BlockPlan]:
    if method.is_static:
        return _static_plan(method, call.layout, q.device)
    order, plan = method.plan(call.layout, q, k, v, call)
    return None if order is None else order.to(q.device), plan


@lru_cache(maxsize=16)
def _static_plan(method: Method, layout: TokenLayout, device: torch.device) -> tuple[TokenOrder | None, BlockPlan]:
    nothing = torch.empty(1, 1, layout.tokens, 1)
    order, plan = method.plan(layout, nothing, nothing)
    return None if order is None else order.to(device), plan.to(device)


def _layout(params: dict[str, Any], tokens: int) -> TokenLayout | None:
    """The grid that the server publishes; None when there is none or it is not the whole sequence."""
    if params.get("latent_shape") is None or params.get("patch_size") is None:
        _say_once("no video geometry was published for this model")
        return None
    frames, height, width = (
        size // patch
        for size, patch in zip(_triple(params["latent_shape"]), _triple(params["patch_size"]), strict=True)
    )
    if frames * height * width != tokens:
        _say_once(f"the sequence has {tokens} tokens and the video {frames} x {height} x {width}")
        return None
    return TokenLayout((frames, height, width))


@lru_cache(maxsize=64)
def _say_once(reason: str) -> None:
    _log.warning("dit_accel: attention runs dense: %s", reason)


def _triple(value: Any) -> tuple[int, int, int]:
    """Three integers from a per-sample tensor `[samples, 3]`, or from a plain sequence."""
    row = torch.as_tensor(value).reshape(-1, 3)[0].tolist()
    return int(row[0]), int(row[1]), int(row[2])


def _first_int(value: Any) -> int:
    return int(torch.as_tensor(value).reshape(-1)[0])
