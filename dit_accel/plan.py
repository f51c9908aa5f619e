"""Which key blocks each query block attends: the one value that passes from methods to kernels.

Axis legend: B batch, H heads, N tokens, nq / nk query / key blocks, C selected blocks of the longest row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dit_accel.blocking import Blocking
from dit_accel.errors import PlanError
from dit_accel.predicate import BoxPredicate
from dit_accel.transfer import to_device
from dit_accel.widest import widened

__all__ = ["BlockPlan", "Blocking", "BoxPredicate"]

# Bytes of lists that are made without asking how long they must be: what the wait costs a short call is worth more than
# the memory, and beside a long call it is nothing.
_UNASKED = 2**24


@dataclass(frozen=True, eq=False)
class BlockPlan:
    """The key blocks that each (batch, head, query block) attends exactly.

    Args:
        q_blocks: partition of the query axis.
        k_blocks: partition of the key axis.
        indices: int32 `[B or 1, H or 1, nq, C]`; the first `counts` entries of a row are valid, the others ignored.
            Valid entries are unique; full blocks stand first, then partial ones, each group ascending.
        counts: int32 `[B or 1, H or 1, nq]`, at least 1 (a row with nothing to attend has no softmax).
        full_counts: int32 like `counts`: how many leading entries are attended whole. None: all of them.
        predicate: decides token by token inside the partial blocks. Required iff `full_counts` is given.

    A size of 1 in the batch or head axis means: the same for all. Memory is proportional to the number of
    selected blocks, never to N².

    Raises:
        PlanError: shapes or dtypes disagree. Contents are checked by `validate()`, which synchronises.
    """

    q_blocks: Blocking
    k_blocks: Blocking
    indices: Tensor
    counts: Tensor
    full_counts: Tensor | None = None
    predicate: BoxPredicate | None = None

    def __post_init__(self) -> None:
        shape = tuple(self.indices.shape)
        if self.indices.dtype != torch.int32 or self.counts.dtype != torch.int32:
            raise PlanError(f"BlockPlan: expected int32, got {self.indices.dtype} and {self.counts.dtype}")
        if len(shape) != 4 or tuple(self.counts.shape) != shape[:3] or shape[2] != self.q_blocks.count:
            raise PlanError(
                f"BlockPlan: expected indices [B, H, {self.q_blocks.count}, C] and counts of its first three "
                f"axes, got {shape} and {tuple(self.counts.shape)}"
            )
        if (self.full_counts is None) != (self.predicate is None):
            raise PlanError("BlockPlan: full_counts and predicate must be given together")

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        q_blocks: Blocking,
        k_blocks: Blocking,
        whole: Tensor | None = None,
        predicate: BoxPredicate | None = None,
        *,
        longest: int | None = None,
    ) -> BlockPlan:
        """Make a plan from a bool block mask `[nq, nk]`, `[H, nq, nk]` or `[B, H, nq, nk]` (True = attend).

        Args:
            mask: the selected blocks.
            q_blocks, k_blocks: the partitions.
            whole: bool like `mask`, the selected blocks that are attended whole; needs `predicate` for the others.
            predicate: decides token by token in the partial blocks; left out when there are none.
            longest: the caller knows that every row selects one to so many blocks: lists of that length, where they
                take 16 MiB or less, are made without asking the device. Default None: lists are as long as the longest
                row, for which the host waits until the device has done all work before.

        Raises:
            PlanError: the mask does not fit the blocks, or, seen where the device is asked, a row selects nothing.
        """
        mask = _four_axes(mask)
        if mask.shape[2:] != (q_blocks.count, k_blocks.count):
            raise PlanError(
                f"BlockPlan.from_mask: expected [..., {q_blocks.count}, {k_blocks.count}], got {tuple(mask.shape)}"
            )
        counts = mask.sum(-1, dtype=torch.int32)
        if longest is None or mask.device.type == "cpu" or 4 * counts.numel() * longest > _UNASKED:
            # The host waits for the device once, for both numbers.
            fewest, longest = (int(n) for n in torch.stack([counts.min(), counts.max()]).tolist())
            if fewest < 1:
                raise PlanError("BlockPlan.from_mask: every query block must select at least one key block")
        full_counts = None
        place = mask.cumsum(-1)
        whole = None if whole is None else _four_axes(whole) & mask
        if whole is not None and not torch.equal(whole, mask):
            # Whole blocks first, then partial ones; each group ascends.
            full_counts = whole.sum(-1, dtype=torch.int32)
            place = torch.where(whole, whole.cumsum(-1), full_counts.unsqueeze(-1) + (mask & ~whole).cumsum(-1))
        # Column 0 takes what is not selected.
        indices = counts.new_zeros(*counts.shape, longest + 1)
        columns = torch.arange(k_blocks.count, dtype=torch.int32, device=mask.device).expand_as(mask)
        indices = indices.scatter_(-1, place.masked_fill_(~mask, 0), columns)[..., 1:].contiguous()
        return cls(q_blocks, k_blocks, indices, counts, full_counts, None if full_counts is None else predicate)

    @classmethod
    def full(cls, q_blocks: Blocking, k_blocks: Blocking, device: torch.device | str = "cpu") -> BlockPlan:
        """The plan that selects everything (its attention equals dense attention)."""
        row = torch.arange(k_blocks.count, dtype=torch.int32, device=device)
        indices = row.expand(1, 1, q_blocks.count, -1).contiguous()
        return cls(q_blocks, k_blocks, indices, torch.full_like(indices[..., 0], k_blocks.count))

    @property
    def valid(self) -> Tensor:
        """Bool `[B', H', nq, C]`: which entries of `indices` count."""
        return torch.arange(self.indices.shape[-1], device=self.indices.device) < self.counts.unsqueeze(-1)

    def to_mask(self) -> Tensor:
        """Bool block mask `[B', H', nq, nk]`; True where selected, partial blocks included."""
        return _mask_of(self.indices, self.counts, self.k_blocks.count)

    def to_token_mask(self) -> Tensor:
        """Bool token mask `[B', H', Nq, Nk]`, O(N²): for the reference, tests and pictures only."""
        return self.token_rows(torch.arange(self.q_blocks.tokens))

    def token_rows(self, queries: Tensor) -> Tensor:
        """The rows of the token mask of some query tokens, int64 `[r]`: bool `[B', H', r, Nk]`."""
        device = self.indices.device
        rows, columns = self.q_blocks.block_of_token()[queries.cpu()].to(device), self.k_blocks.block_of_token()
        columns = columns.to(device)
        indices, counts = self.indices[:, :, rows], self.counts[:, :, rows]
        mask = _mask_of(indices, counts, self.k_blocks.count)[..., columns]
        if self.predicate is None or self.full_counts is None:
            return mask
        whole = _mask_of(indices, self.full_counts[:, :, rows], self.k_blocks.count)[..., columns]
        inside = self.predicate.to(device).keeps(queries.to(device), torch.arange(len(columns), device=device))
        return whole | (mask & inside)

    def of_head(self, item: int, head: int) -> BlockPlan:
        """The plan of one head of one batch item, `[1, 1, nq, C]`; shared axes hold for any."""
        item, head = min(item, self.indices.shape[0] - 1), min(head, self.indices.shape[1] - 1)
        here = (slice(item, item + 1), slice(head, head + 1))
        return replace(
            self,
            indices=self.indices[here],
            counts=self.counts[here],
            full_counts=None if self.full_counts is None else self.full_counts[here],
            predicate=None if self.predicate is None else self.predicate.of_head(item, head),
        )

    @property
    def density(self) -> float:
        """Share of (query, key) token pairs computed, averaged over batch and heads; partial blocks count whole."""
        return float(self.density_per_head().mean())

    def density_per_head(self) -> Tensor:
        """Share of token pairs computed, float64 `[B', H']`."""
        lengths = widened(self.k_blocks.on(self.indices.device)[1])
        index = self.indices.clamp(0, self.k_blocks.count - 1).long()
        keys = torch.where(self.valid, lengths[index], 0.0).sum(-1)
        queries = widened(self.q_blocks.on(self.indices.device)[1])
        return (keys * queries).sum(-1) / (self.q_blocks.tokens * self.k_blocks.tokens)

    def validate(self) -> BlockPlan:
        """Check the contents (synchronises with the device) and return self.

        Raises:
            PlanError: an empty row, an index out of range, or valid entries not unique and ascending per group.
        """
        if int(self.counts.min()) < 1 or int(self.counts.max()) > self.indices.shape[-1]:
            raise PlanError(f"BlockPlan: counts must lie in [1, {self.indices.shape[-1]}]")
        valid, index = self.valid, self.indices.long()
        if bool(((index < 0) | (index >= self.k_blocks.count))[valid].any()):
            raise PlanError(f"BlockPlan: block indices must lie in [0, {self.k_blocks.count})")
        ascending = index[..., 1:] > index[..., :-1]
        if self.full_counts is not None:
            positions = torch.arange(1, index.shape[-1], device=index.device)
            ascending = ascending | (positions == self.full_counts.unsqueeze(-1))
        if not bool(ascending[valid[..., 1:]].all()):
            raise PlanError("BlockPlan: valid block indices must be unique and ascending in each row")
        if int(self.to_mask().sum()) != int(self.counts.sum()):
            raise PlanError("BlockPlan: a block is selected twice in one row")
        return self

    def to(self, device: torch.device | str) -> BlockPlan:
        """The same plan with its tensors on `device`; itself when they are there."""
        if self.indices.device == torch.device(device):
            return self
        return replace(
            self,
            indices=to_device(self.indices, device),
            counts=to_device(self.counts, device),
            full_counts=None if self.full_counts is None else to_device(self.full_counts, device),
            predicate=None if self.predicate is None else self.predicate.to(device),
        )

    def each_tensor(self, change: Callable[[Tensor], Tensor]) -> BlockPlan:
        """The same plan after `change` of all that has axes of batch and heads, `[B', H', ...]`."""
        box = self.predicate
        if box is not None and not box.is_shared:
            box = replace(box, lower=change(box.lower), upper=change(box.upper), coordinates=change(box.coordinates))
        full = None if self.full_counts is None else change(self.full_counts)
        indices, counts = change(self.indices), change(self.counts)
        return replace(self, indices=indices, counts=counts, full_counts=full, predicate=box)

    def recall(
        self,
        q: Tensor,
        k: Tensor,
        *,
        rows: int = 256,
        kv_len: Tensor | None = None,
        scale: float | None = None,
        seed: int = 0,
    ) -> Tensor:
        """Share of the true attention mass that the plan covers, per head: exact on sampled query rows.

        A test of a selection, not a verdict on it: it says little about how a video looks.

        Args:
            q, k: `[B, H, N, D]`, standing in the order the plan was made for.
            rows: how many query tokens are looked at, spread over the sequence. Default 256; at most all.
            kv_len: int `[B]`, how many leading keys are real. Default: all. Padded queries are left out too.
            scale: factor on the logits. Default 1 / sqrt(D).
            seed: which rows are drawn.

        Returns:
            fp64 `[B, H]` in [0, 1].
        """
        from dit_accel.recall import plan_recall

        return plan_recall(self, q, k, rows=rows, kv_len=kv_len, scale=scale, seed=seed)

    def save(self, path: str | Path) -> None:
        """Write the plan as safetensors."""
        from dit_accel.plan_io import save_plan

        save_plan(self, path)

    @classmethod
    def load(cls, path: str | Path) -> BlockPlan:
        """Read a plan written by `save`."""
        from dit_accel.plan_io import load_plan

        return load_plan(path)


def _mask_of(indices: Tensor, counts: Tensor, blocks: int) -> Tensor:
    """Bool `[..., blocks]`, True at the first `counts` `[...]` of the `indices` `[..., C]` of each row."""
    valid = torch.arange(indices.shape[-1], device=indices.device) < counts.unsqueeze(-1)
    # One spare column takes the entries that do not count.
    mask = indices.new_zeros((*counts.shape, blocks + 1), dtype=torch.bool)
    return mask.scatter_(-1, torch.where(valid, indices, blocks).long(), True)[..., :-1]


def _four_axes(mask: Tensor) -> Tensor:
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    return mask
