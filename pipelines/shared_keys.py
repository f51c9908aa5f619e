"""A clip that attends with the keys and values of the clip before it (DiTCtrl, arXiv 2412.18597), for CogVideoX.

Axis legend: B batch rows, N joint tokens (text before video), M text tokens, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor

from dit_accel.errors import UnsupportedError
from dit_accel.families.cogvideox import CogVideoXJointAttention
from dit_accel.families.processor import AttentionInputs
from dit_accel.report.records import CallRecord, Report

_CHUNK_NUMBERS = 1 << 24  # size of the largest temporary of a subject map, in numbers: 64 MiB in fp32
_METHOD = "shared_keys"
# A pair of clips is one batch: source and target without the prompt, then both with it.
_SOURCE_OF_ROW = (0, 0, 2, 2)
_SOURCE, _TARGET = 2, 3


@dataclass
class Sharing:
    """When a clip attends with the keys and values of the clip before it, and which tokens name the subject.

    Args:
        steps: denoising steps. Default 2 to 24.
        layers: attention layers. Default: the last sixth, 25 to 29 of 30.
        subject: text tokens of the subject. With them, the subject of the target attends the subject of the source, and
            the background the background. Default: none, everything is shared.
        threshold: of the subject map, which is scaled to [0, 1] in every frame. Default 0.3.
    """

    steps: Collection[int] = range(2, 25)
    layers: Collection[int] | None = None
    subject: tuple[int, ...] = ()
    threshold: float = 0.3


@dataclass
class Control:
    """What the attention processors of a generation ask: it shares, or attends as usual.

    Args:
        sharing: when and what to share.
        modules: the attention modules in execution order.
        text, frame_tokens: text tokens, and tokens of a frame, of the pass under way.
        step: denoising step of the pass under way.
        pair: which pair of clips it is over.
        calls: what every call computed.
    """

    sharing: Sharing
    modules: list[Any]
    text: int = 0
    frame_tokens: int = 0
    step: int = 0
    pair: int = 0
    calls: list[CallRecord] = field(default_factory=list)
    _maps: list[Tensor] = field(default_factory=list)

    @property
    def layers(self) -> Collection[int]:
        """Layers that share."""
        count = len(self.modules)
        return range(count - max(1, count // 6), count) if self.sharing.layers is None else self.sharing.layers

    def report(self) -> Report:
        """What the calls so far computed, with the sharing as the parameters."""
        steps, subject = (list(values) for values in (self.sharing.steps, self.sharing.subject))
        parameters = {"steps": steps, "layers": list(self.layers), "subject": subject}
        settings = {"method": _METHOD, "parameters": {**parameters, "threshold": self.sharing.threshold}}
        return Report(self.calls, settings)

    def begin(self, step: int, text: int, frame_tokens: int, pair: int = 0) -> None:
        """A forward pass over a pair of clips begins."""
        self.step, self.text, self.frame_tokens, self.pair = step, text, frame_tokens, pair
        self._maps = []

    def attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, *, dense: Callable[[], Tensor]) -> Tensor:
        """One joint attention call; q, k, v `[B, N, H, D]` after norms and rotary embedding."""
        layer = self.modules.index(module)
        record = CallRecord("transformer", layer, self.step, f"clips {self.pair}", 0, _METHOD, None)
        self.calls.append(record)
        shares = self.step in self.sharing.steps
        if shares and self.sharing.subject:
            with record.timed("select", q.device):
                self._maps.append(subject_map(q, k, self.text, self.sharing.subject))
        if not shares:
            record.reason = f"step {self.step} shares no keys"
        elif layer not in self.layers:
            record.reason = f"layer {layer} shares no keys"
        elif not self.sharing.subject:
            record.reason = "dense attention to the keys of the clip before"
        else:
            # Video queries of the target rows, half of all, attend once more, to the subject and to the background.
            record.density = 1 + (q.shape[1] - self.text) * (k.shape[1] + self.text) / (2 * q.shape[1] * k.shape[1])
        with record.timed("attend", q.device):
            return self._shared(q, k, v) if shares and layer in self.layers else dense()

    def _shared(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every clip of a pair over the keys of the first, `[B, N, H, D]`."""
        rows = torch.tensor(_SOURCE_OF_ROW, device=q.device)
        k, v = k[rows], v[rows]
        out: Tensor = dispatch_attention_fn(q, k, v)
        if self.sharing.subject:
            for row in (1, 3):
                out[row, self.text :] = self._masked(q[row, self.text :], k[row], v[row])
        return out

    def _masked(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Video queries `[N - M, H, D]` of a target over the keys `[N, H, D]` of its source, subject to subject."""
        source, target = (
            binary_map(torch.stack(self._maps).mean(0)[row], self.frame_tokens, self.sharing.threshold)
            for row in (_SOURCE, _TARGET)
        )
        words = source.new_ones(self.text)
        parts = []
        for chosen in (source, ~source):
            keep = torch.cat([words, chosen])
            parts.append(dispatch_attention_fn(q[None], k[None, keep], v[None, keep])[0])
        return torch.where(target[:, None, None], parts[0], parts[1])


class _SharedAttention(CogVideoXJointAttention):
    """The projections, norms and rotary embedding of the family's processor around `Control` in place of an engine."""

    def __init__(self, control: Control) -> None:
        self.control = control

    def attend_joint(self, inputs: AttentionInputs) -> Tensor:
        """All `[B, N, H, D]`, text before the video; returns `[B, N, H * D]`."""
        query, key, value = inputs.query, inputs.key, inputs.value
        out = self.control.attend(
            inputs.attn, query, key, value, dense=lambda: self.dense(query, key, value, inputs.mask)
        )
        return out.flatten(2, 3).type_as(query)


def subject_map(q: Tensor, k: Tensor, text: int, subject: tuple[int, ...]) -> Tensor:
    """Probability of the subject's tokens for each video query, mean over heads, `[B, N - M]`.

    Only `len(subject)` columns of the attention matrix are made; the normaliser is summed query by query chunk.

    Args:
        q, k: `[B, N, H, D]`.
        text: number of text tokens, which stand first.
        subject: indices of text tokens.
    """
    scale, parts = q.shape[-1] ** -0.5, []
    columns, rows = list(subject), max(1, _CHUNK_NUMBERS // (k.shape[0] * k.shape[1] * k.shape[2]))
    for part in q[:, text:].split(rows, dim=1):
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", part.float(), k.float())
        parts.append((scores[..., columns] - scores.logsumexp(-1, keepdim=True)).exp().sum(-1).mean(1))
    return torch.cat(parts, dim=1)


def binary_map(values: Tensor, frame_tokens: int, threshold: float) -> Tensor:
    """Bool `[N - M]`: where values, scaled to [0, 1] in every frame, exceed the threshold."""
    frames = values.view(-1, frame_tokens)
    low, high = frames.amin(-1, keepdim=True), frames.amax(-1, keepdim=True)
    return ((frames - low) / (high - low + 1e-6) > threshold).flatten()


@contextmanager
def sharing_keys(transformer: Any, sharing: Sharing) -> Iterator[Control]:
    """The transformer with processors that share keys and values; the old ones come back.

    Args:
        transformer: of CogVideoX.
        sharing: when and what to share.

    Raises:
        UnsupportedError: the transformer runs under Diffusers' context parallelism.
    """
    if getattr(transformer, "_parallel_config", None) is not None:
        raise UnsupportedError("several prompts under Diffusers' context parallelism are not supported; disable it")
    modules = [block.attn1 for block in transformer.transformer_blocks]
    old = [module.processor for module in modules]
    control = Control(sharing, modules)
    processor = _SharedAttention(control)
    try:
        for module in modules:
            module.set_processor(processor)
        yield control
    finally:
        for module, kept in zip(modules, old, strict=True):
            module.set_processor(kept)
