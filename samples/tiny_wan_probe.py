"""Linear classifiers that teach early layers of the small model what they need to know; used in training only."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn import functional as F

from dit_accel.samples.repertoire import BASIC, SHAPE_MEANINGS, Repertoire

_PROBED_LAYERS = 3
_SHAPE_WEIGHT = 8.0  # of the words for shapes: they change outlines only, and are learnt last or never without it


class Probe(nn.Module):
    """Teaches early layers what they need to know; used in training only.

    Rotary positions are relative, so a model must infer from its surroundings where the canvas ends; without that it
    cannot place anything. A word that changes only where something is, and only in late frames, is not worth attending
    to before places are known. Linear classifiers on the hidden states of the first layers give each of these a signal
    of its own: row, column and frame of a token, the words of the caption, and whether the object is there. At the end
    they are thrown away.

    Args:
        model: the transformer; it is hooked.
        grid: latent frames, rows and columns of whole clips.
        layers: how many of the first layers are probed.
        repertoire: what captions can mean. Default: `BASIC`.
    """

    def __init__(
        self,
        model: WanTransformer3DModel,
        grid: tuple[int, int, int],
        layers: int = _PROBED_LAYERS,
        repertoire: Repertoire = BASIC,
    ) -> None:
        super().__init__()
        self.meanings = repertoire.meanings
        self.sizes = (*grid, len(self.meanings), 1)
        width = model.config.num_attention_heads * model.config.attention_head_dim
        heads = (nn.Sequential(nn.LayerNorm(width), nn.Linear(width, sum(self.sizes))) for _ in range(layers))
        self.heads = nn.ModuleList(heads)
        self._hidden: dict[int, Tensor] = {}
        for index in range(layers):
            model.blocks[index].register_forward_hook(lambda _, __, hidden, index=index: self._keep(index, hidden))

    def _keep(self, index: int, hidden: Tensor) -> None:
        self._hidden[index] = hidden

    def loss(self, frames: Tensor, captions: list[str], objects: Tensor) -> Tensor:
        """Mean cross-entropy of the last forward pass.

        Args:
            frames: the latent frames that its clips held.
            captions: theirs, empty where they were dropped.
            objects: where the object is, bool `[B, T, H, W]`.
        """
        _, rows, columns = self.sizes[:3]
        device = objects.device
        places = torch.cartesian_prod(frames, torch.arange(rows), torch.arange(columns)).to(device).unbind(-1)
        words = torch.tensor([[float(is_said(caption)) for is_said in self.meanings] for caption in captions])
        words = words.to(device)
        weight = [_SHAPE_WEIGHT if is_said in SHAPE_MEANINGS else 1.0 for is_said in self.meanings]
        heavy = torch.tensor(weight, device=device)
        losses = []
        for index, head in enumerate(self.heads):
            *where, said, there = head(self._hidden.pop(index)).split(self.sizes, dim=-1)
            for guess, at in zip(where, places, strict=True):
                losses.append(F.cross_entropy(guess.flatten(0, 1), at.repeat(len(guess))))
            losses.append(10 * F.binary_cross_entropy_with_logits(said, words[:, None].expand_as(said), heavy))
            mask = objects.flatten(1).unsqueeze(-1).float()
            losses.append(10 * F.binary_cross_entropy_with_logits(there, mask))
        return torch.stack(losses).mean()
