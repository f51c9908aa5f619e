"""Fixed patterns per head: a band, the band of another token order, or stripes of key columns."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from dit_accel.errors import ConfigError
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import FROM_LIST, BlockSize, Count, Density, Method
from dit_accel.methods.registry import register
from dit_accel.order import TokenOrder
from dit_accel.plan import Blocking, BlockPlan
from dit_accel.sampling import sample_rows, sampled_logits
from dit_accel.state import CallContext
from dit_accel.static_masks import band, half_width, spans, token_major, token_major_places, with_prefix, with_text


@register("sparse_vdit")
class SparseVDiT(Method):
    """Sparse-vDiT (arXiv 2506.03065): one of a few fixed patterns per head, chosen offline.

    The choice is a head table (`head_table` of the schedule) whose modes set `mode` and `columns` here, or name another
    method, "dense" or "skip"; without a table all heads have the pattern named here.

    Published: 10 dense steps on HunyuanVideo and Wan2.1, none on CogVideoX1.5. The band's width and the columns are
    not printed in the paper: we take the width rule of Sparse VideoGen, and blocks of 128. Conditioning frames are
    seen by all.

    Args:
        mode: "diagonal": a band around the diagonal; "multi_diagonal": the same band after the tokens of one place
            have been put side by side over all frames; "stripe": `columns` for all queries; "full": everything.
        density: share of the token pairs of the video that the pattern keeps.
        block: block size in tokens.
        columns: for "stripe", the key blocks of the video, as found by `stripe_columns`. Default none: evenly spaced
            ones up to `density`.
    """

    source: ClassVar[str] = "arXiv 2506.03065"
    is_static: ClassVar[bool] = True

    mode: Literal["full", "diagonal", "multi_diagonal", "stripe"] = "diagonal"
    density: Density = 0.3
    block: BlockSize = 128
    columns: Annotated[tuple[Count, ...], FROM_LIST] = ()

    @property
    def keeps_padding_last(self) -> bool:
        """Yes, but for "multi_diagonal", which stands place by place."""
        return self.mode != "multi_diagonal"

    def order(self, q: Tensor, k: Tensor, v: Tensor, call: CallContext) -> TokenOrder | None:
        """Token-major for "multi_diagonal", else the raster."""
        return token_major(call.layout, call.layout.prefix_frames) if self.mode == "multi_diagonal" else None

    def select(self, q: Tensor, k: Tensor, call: CallContext) -> BlockPlan:
        """The blocks that the pattern touches. q, k `[B, H, N, D]` are not looked at; text is kept whole.

        Raises:
            ConfigError: a column beyond the video.
        """
        layout = call.layout
        blocks = self.blocks(layout)
        if self.mode == "full":
            return BlockPlan.full(blocks, blocks)
        first, last = spans(blocks, layout)
        if self.mode == "stripe":
            mask = torch.zeros(len(first), len(first), dtype=torch.bool)
            mask[:, self._columns(len(mask))] = True
        else:
            is_raster = self.mode == "diagonal"
            at = torch.arange(layout.video) if is_raster else token_major_places(layout, layout.prefix_frames)
            ends = (at[first], at[last])
            mask = band(ends, ends, half_width(layout, self.density))
        return BlockPlan.from_mask(with_text(layout, blocks, with_prefix(layout, blocks, mask)), blocks, blocks)

    def blocks(self, layout: TokenLayout) -> Blocking:
        """The partition of the sequence; conditioning frames share no block with other frames."""
        frames = [layout.frame_tokens] * layout.prefix_frames
        cuts = [n for n in (*frames, layout.video - sum(frames)) if n]
        return layout.blocks(self.block, video=Blocking.segments(cuts, self.block))

    def _columns(self, count: int) -> Tensor:
        """The key blocks of a stripe, of `count` in the video."""
        if not self.columns:
            kept = max(1, round(self.density * count))
            return (torch.arange(kept) * 2 + 1) * count // (2 * kept)
        if max(self.columns) >= count:
            raise ConfigError(
                "method.sparse_vdit.columns",
                f"the video has {count} blocks of {self.block} tokens, got column {max(self.columns)}",
            )
        return torch.tensor(self.columns)


def stripe_columns(
    q: Tensor, k: Tensor, layout: TokenLayout, method: SparseVDiT, rows: int = 64, seed: int = 0
) -> Tensor:
    """The key blocks that hold the most attention mass of sampled queries, int64 `[B, H, kept]`, ascending.

    The paper does not say how columns are found; this is our choice. Average the mass over prompts to decide offline.

    Args:
        q, k: `[B, H, N, D]` in raster order.
        layout: token geometry.
        method: gives block size and density.
        rows: sampled queries.
        seed: of the sample.
    """
    blocks = method.blocks(layout)
    owner = blocks.block_of_token().to(q.device)
    video = ~layout.text_blocks(blocks).to(q.device)
    found = []
    for _, logits in sampled_logits(q, k, sample_rows(layout, rows, seed), layout):
        mass = logits.softmax(-1).mean(2)
        mass = mass.new_zeros(*mass.shape[:2], blocks.count).index_add_(-1, owner, mass)[..., video]
        found.append(mass.topk(max(1, round(method.density * mass.shape[-1]))).indices.sort(-1).values)
    return torch.cat(found, 1)


def choose_mode(errors: Tensor, skipped: Tensor, weight: float = 0.5, limit: float = 1.0) -> Tensor:
    """The paper's rule (equations 2 and 3): the cheapest mode that is good enough, else full attention.

    The loss of a mode is error + `weight` * (1 - skipped). Full attention stays where every loss exceeds `limit`. Ties
    go to the mode that skips more, then to the lower index (our choice). The normalisation of the error is not printed;
    with the squared error relative to the squared output of full attention, `limit` has to be calibrated.

    Args:
        errors: error of each sparse mode, `[..., M]`.
        skipped: share of the blocks that each mode leaves out, `[M]`.
        weight: price of computing everything (lambda).
        limit: largest loss that is accepted (epsilon).

    Returns:
        int64 `[...]`: 0 for full attention, 1 + index of the mode otherwise.
    """
    loss = errors + weight * (1 - skipped)
    by_skipped = skipped.argsort(descending=True, stable=True)
    best = by_skipped[loss[..., by_skipped].argmin(-1)]
    return torch.where((loss > limit).all(-1), 0, best + 1)
