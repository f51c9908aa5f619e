"""Attention of the small models for less work than the stock processors take, in training and where they are judged.

Cross-attention gives the same output. Self-attention is dense attention in bfloat16, for processors whose products of
bfloat16 are fast: twice as fast there as PyTorch's own, and with logits rounded to bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.nn import functional as F

from dit_accel.samples.repertoire import BASIC

PIPELINE_TEXT = 512  # text tokens that WanPipeline attends unless told otherwise
_ROWS = 256  # queries at a time: their scores stay in the cache


class PaddedCrossAttention:
    """Cross-attention in which one padding key stands for the many that WanPipeline attends.

    WanPipeline pads text embeddings with zeros to `max_sequence_length` and masks nothing. All padding
    keys are equal, so one of them with the bias ln(their number) gives the same output for a twentieth of the work.

    Args:
        tokens: of the texts; the last is always padding. Default: those of the basic repertoire.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, tokens: int = BASIC.text_tokens) -> None:
        self.tokens = tokens
        self.bias = torch.zeros(1, 1, 1, tokens)
        self.pad_to(PIPELINE_TEXT)

    def pad_to(self, tokens: int) -> None:
        """Act as if texts were padded to `tokens`, at least as many as they have here."""
        self.bias[..., -1] = math.log(tokens - self.tokens + 1)

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        """Attend `hidden_states` `[B, N, C]` to `encoder_hidden_states` `[B, L, C]`, padding beyond `tokens`."""
        encoder_hidden_states = encoder_hidden_states[:, : self.tokens]
        q = attn.norm_q(attn.to_q(hidden_states))
        k, v = attn.norm_k(attn.to_k(encoder_hidden_states)), attn.to_v(encoder_hidden_states)
        q, k, v = (x.unflatten(2, (attn.heads, -1)).transpose(1, 2) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias.to(q))
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2, 3))
        return projected


class SelfAttentionInHalf:
    """Attention processor of a Wan transformer's self-attention, with gradients, in bfloat16.

    PyTorch's attention on a CPU multiplies bfloat16 no faster than fp32; plain products do, several times.
    """

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self, attn: Any, hidden_states: Tensor, _: None, __: None, rotary_emb: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Attend `hidden_states` `[B, N, C]` to themselves."""
        x = hidden_states
        q, k, v = attn.norm_q(attn.to_q(x)), attn.norm_k(attn.to_k(x)), attn.to_v(x)
        q, k, v = (each.unflatten(2, (attn.heads, -1)) for each in (q, k, v))
        cos, sin = (table[..., ::2] for table in rotary_emb)
        q, k = _turn(q, cos, sin), _turn(k, cos, sin)
        out = attend_in_half(*(each.transpose(1, 2) for each in (q, k, v)))
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).flatten(2))
        return projected


def attend_in_half(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense attention of q `[B, H, N, D]` over k, v `[B, H, M, D]` in bfloat16, with gradients; as `v` in type."""
    heads = (each.flatten(0, 1).bfloat16() for each in (q * q.shape[-1] ** -0.5, k, v))
    out: Tensor = _Attention.apply(*heads)
    return out.unflatten(0, q.shape[:2]).to(v)


@contextmanager
def dense_in_half(transformer: WanTransformer3DModel, text_tokens: int) -> Iterator[None]:
    """Calls of a Wan pipeline inside run its `transformer` in bfloat16, with both processors of this module.

    Args:
        transformer: fp32, on a CPU; its own processors come back at the end.
        text_tokens: more than any prompt has.
    """
    stock = dict(transformer.attn_processors)
    cross = PaddedCrossAttention(text_tokens)
    transformer.set_attn_processor({n: cross if "attn2" in n else SelfAttentionInHalf() for n in stock})
    try:
        with torch.autocast("cpu", torch.bfloat16):
            yield
    finally:
        transformer.set_attn_processor(stock)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of pairs of channels of `x` `[B, N, H, D]` by `cos` and `sin` `[1, N, 1, D / 2]`."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v of bfloat16 `[B * H, N, D]`, q scaled; scores are made again on the way back."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (each.contiguous() for each in (q, k, v))
        out = torch.empty_like(q)
        for head in range(len(q)):
            keys = k[head].T.contiguous()
            for rows in _slices(q.shape[1]):
                torch.mm(torch.softmax(q[head, rows] @ keys, -1), v[head], out=out[head, rows])
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out = ctx.saved_tensors
        grad = grads[0].to(q.dtype).contiguous()
        drift = (grad.float() * out.float()).sum(-1, keepdim=True).to(q.dtype)
        for_q, for_k = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32)
        for_v = torch.zeros_like(for_k)
        for head in range(len(q)):
            keys, values = k[head].T.contiguous(), v[head].T.contiguous()
            for rows in _slices(q.shape[1]):
                share = torch.softmax(q[head, rows] @ keys, -1)
                for_v[head] += share.T @ grad[head, rows]
                score = (grad[head, rows] @ values).sub_(drift[head, rows]).mul_(share)
                torch.mm(score, k[head], out=for_q[head, rows])
                for_k[head] += score.T @ q[head, rows]
        return for_q, for_k.to(k.dtype), for_v.to(v.dtype)


def _slices(length: int) -> list[slice]:
    return [slice(start, start + _ROWS) for start in range(0, length, _ROWS)]
