"""Small causal models and an independent one-shot reference: the whole video in one pass under a mask, in fp64."""

from __future__ import annotations

import imageio.v2 as imageio
import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import nn

FRAME = (4, 6)
TOKENS = 6  # patches of 2 x 2
CHANNELS = 4
SETTINGS = "steps: [1000, 500]\nchunk: 2\nwindow: 6\nsink: 2\n"
"""Settings of a short stream, as the file that `--stream-settings` names."""


def frames_of(path):
    """The frames of a written video."""
    return np.stack(imageio.mimread(path))


def tiny_transformer(layers=2, seed=0, heads=2, head_dim=24, frames=64):
    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=8,
        freq_dim=32,
        ffn_dim=32,
        num_layers=layers,
        rope_max_seq_len=frames,
    )
    nn.init.normal_(model.proj_out.weight, std=0.3)
    return model.eval()


def latents(frames, batch=1, seed=0, size=FRAME):
    return torch.randn(batch, CHANNELS, frames, *size, generator=torch.Generator().manual_seed(seed))


def text(seed=0, batch=1, length=5):
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(100 + seed))


class MaskedReference:
    """A processor that attends under a token mask `[N, N]`, everything from the projections on in fp64."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        q, k = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states))
        q, k, v = (x.double().unflatten(2, (attn.heads, -1)) for x in (q, k, attn.to_v(hidden_states)))
        cos, sin = (x.double() for x in rotary_emb)
        q, k = (
            torch.view_as_real(
                torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
                * torch.complex(cos[..., 0::2].contiguous(), sin[..., 1::2].contiguous())
            ).flatten(-2)
            for x in (q, k)
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        weights = scores.masked_fill(~self.mask, -torch.inf).softmax(-1)
        out = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2).to(hidden_states.dtype)
        return attn.to_out[1](attn.to_out[0](out))


def frame_mask(sees, frames, tokens=TOKENS):
    """Token mask from `sees(query frame, key frame)`."""
    mask = torch.tensor([[sees(q, k) for k in range(frames)] for q in range(frames)])
    return mask.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1)


@torch.no_grad()
def one_shot(model, video, prompt, mask, timestep=0.0):
    """The stock model over all frames under `mask`; `timestep` is one number, or one per frame."""
    stock = [block.attn1.processor for block in model.blocks]
    steps = torch.as_tensor(timestep, dtype=torch.float32)
    if steps.ndim:
        steps = steps.repeat_interleave(len(mask) // len(steps)).expand(len(video), -1)
    else:
        steps = steps.expand(len(video))
    for block in model.blocks:
        block.attn1.set_processor(MaskedReference(mask))
    try:
        return model(video, steps, prompt, return_dict=False)[0]
    finally:
        for block, processor in zip(model.blocks, stock, strict=True):
            block.attn1.set_processor(processor)


def block_causal(chunk, window=None, sink=0):
    """Query frames see their chunk and what precedes it, within a window that counts from the end of the chunk."""

    def sees(q, k):
        end = (q // chunk + 1) * chunk
        return k < end and (window is None or k >= end - (window - sink) or k < sink)

    return sees
