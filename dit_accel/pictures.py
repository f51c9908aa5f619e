"""Pictures of what a method computes: over the frame x frame plane, and for one query over the frames."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from dit_accel.errors import ConfigError, UnsupportedError
from dit_accel.head_table import HeadTable
from dit_accel.layout import TokenLayout
from dit_accel.methods.base import Method
from dit_accel.order import TokenOrder
from dit_accel.plan import BlockPlan

_SIDE = 240  # bins of the plane, more would not be seen
_PANELS_PER_ROW = 6


@dataclass(frozen=True, eq=False)
class MethodPicture:
    """What a method computes on a grid, in raster coordinates, whatever order the method uses.

    Args:
        title: method and parameters.
        grid: (frames, height, width).
        plane: share of token pairs computed between runs of video tokens, float64 `[heads, bins, bins]`; a frame is a
            whole number of bins. Partial blocks count whole, as they are computed.
        query: the video token whose keys are shown, in raster order.
        seen: the video tokens that this query attends, bool `[heads, frames, height, width]`; exact in partial blocks.
        density: share of token pairs computed over the whole sequence, per head.
        labels: what each row of the picture is of; empty: of one head.
    """

    title: str
    grid: tuple[int, int, int]
    plane: Tensor
    query: int
    seen: Tensor
    density: tuple[float, ...]
    labels: tuple[str, ...] = ()


def picture_of(method: Method, layout: TokenLayout, query: int | None = None, heads: int = 2) -> MethodPicture:
    """Plan `method` on `layout` and look at the plan.

    A method that depends on queries and keys is shown on smooth random ones, which are the same at every call; one that
    does not is shown once, for all heads.

    Args:
        method: what to show.
        layout: token geometry.
        query: video token in raster order. Default: the middle of the grid.
        heads: heads to plan for.

    Raises:
        ConfigError: `query` is outside the video.
    """
    middle = (layout.frames // 2 * layout.grid[1] + layout.grid[1] // 2) * layout.grid[2] + layout.grid[2] // 2
    query = middle if query is None else query
    if not 0 <= query < layout.video:
        raise ConfigError("query", f"expected a video token in [0, {layout.video}), got {query}")
    q, k = smooth_tensors(layout, heads)
    order, plan = method.plan(layout, q, k)
    shown = max(plan.indices.shape[1], 1 if order is None or order.query.ndim == 1 else order.query.shape[1])
    density = plan.density_per_head()[0].expand(shown).tolist()
    return MethodPicture(
        f"{method.name} {method.model_dump(exclude_unset=True) or ''}".strip(),
        layout.grid,
        torch.stack([_plane(layout, order, plan, head) for head in range(shown)]),
        query,
        torch.stack([_seen(layout, order, plan, head, query) for head in range(shown)]),
        tuple(density),
    )


def picture_of_layer(
    table: HeadTable, layer: int, base: Method, layout: TokenLayout, query: int | None = None
) -> MethodPicture:
    """What the heads of one layer of a head table compute: one row per mode, none computed where it is "skip".

    Args:
        table: modes of heads.
        layer: which layer.
        base: the method that modes without a name change.
        layout: token geometry.
        query: video token in raster order. Default: the middle of the grid.

    Raises:
        ConfigError: `layer` is not in the table, or `query` not in the video.
    """
    if not 0 <= layer < table.layer_count:
        raise ConfigError("layer", f"expected a layer of the table in [0, {table.layer_count}), got {layer}")
    groups = table.groups(layer, base)
    found = [picture_of(base if group.method is None else group.method, layout, query, 1) for group in groups]
    computed = [group.method is not None for group in groups]
    return MethodPicture(
        f"layer {layer} of {table.layer_count}",
        layout.grid,
        torch.cat([part.plane[:1] * seen for part, seen in zip(found, computed, strict=True)]),
        found[0].query,
        torch.cat([part.seen[:1] & seen for part, seen in zip(found, computed, strict=True)]),
        tuple(part.density[0] * seen for part, seen in zip(found, computed, strict=True)),
        tuple(
            f"heads {', '.join(map(str, group.heads))}: {part.title if seen else 'skipped'}"
            for group, part, seen in zip(groups, found, computed, strict=True)
        ),
    )


def smooth_tensors(layout: TokenLayout, heads: int, dim: int = 32, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys that vary smoothly over the grid, `[1, H, N, D]` each; text tokens are noise."""
    generator = torch.Generator().manual_seed(seed)
    at = layout.coordinates / torch.tensor(layout.grid)
    tensors = torch.randn(2, heads, layout.tokens, dim, generator=generator)
    field = 6 * torch.randn(heads, 3, dim, generator=generator)
    tensors[:, :, layout.video_slice()] *= 0.3
    tensors[:, :, layout.video_slice()] += 2 * (at @ field).sin()
    return tensors[:1], tensors[1:]


def _of_head(index: Tensor, head: int) -> Tensor:
    """The permutation `[N]` of one head of the first batch item, of `[N]` or `[B or 1, H or 1, N]`."""
    return index if index.ndim == 1 else index[0, min(head, index.shape[1] - 1)]


def _plane(layout: TokenLayout, order: TokenOrder | None, plan: BlockPlan, head: int) -> Tensor:
    parts = max(1, min(layout.frame_tokens, _SIDE // layout.frames))
    index = torch.arange(layout.video)
    in_frame = index % layout.frame_tokens * parts // layout.frame_tokens
    bins = index // layout.frame_tokens * parts + in_frame
    count = layout.frames * parts
    bin_of = torch.full((layout.tokens,), count)  # one spare bin for text
    bin_of[layout.video_slice()] = bins
    shares = []
    for blocks, tokens in ((plan.q_blocks, None if order is None else order.query),
                           (plan.k_blocks, None if order is None else order.key_index)):  # fmt: skip
        held = bin_of if tokens is None else bin_of[_of_head(tokens, head)]
        tokens_in = torch.zeros(blocks.count, count + 1, dtype=torch.float64)
        ones = torch.ones(layout.tokens, dtype=torch.float64)
        tokens_in.index_put_((blocks.block_of_token(), held), ones, accumulate=True)
        shares.append(tokens_in[:, :-1] / bins.bincount())
    mask = plan.to_mask()[0, min(head, plan.indices.shape[1] - 1)].double()
    return shares[0].T @ mask @ shares[1]


def _seen(layout: TokenLayout, order: TokenOrder | None, plan: BlockPlan, head: int, query: int) -> Tensor:
    token = query + layout.video_start
    raster = torch.arange(layout.tokens)
    queries = raster if order is None else _of_head(order.query, head)
    keys = raster if order is None else _of_head(order.key_index, head)
    seen = torch.zeros(layout.tokens, dtype=torch.bool)
    seen[keys] = plan.of_head(0, head).token_rows((queries == token).nonzero().flatten())[0, 0, 0]
    return seen[layout.video_slice()].view(layout.grid)


def draw(picture: MethodPicture, path: str | Path | BinaryIO) -> None:
    """Write the picture as an image: one row per head, the plane on the left, the frames of the query on the right.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    frames, height, width = picture.grid
    columns = min(frames, _PANELS_PER_ROW)
    heads = len(picture.plane)
    figure = _figure((12, 5.5 * heads))
    figure.suptitle(picture.title)
    at = (picture.query // (height * width), picture.query // width % height, picture.query % width)
    for head, row in enumerate(figure.subfigures(heads, 1, squeeze=False)[:, 0]):
        left, right = row.subfigures(1, 2)
        axes = left.add_subplot()
        axes.imshow(picture.plane[head], vmin=0, vmax=1, cmap="Blues", extent=(0, frames, frames, 0))
        axes.set(
            xlabel="key frame", ylabel="query frame", title=f"blocks computed, density {picture.density[head]:.3f}"
        )
        if picture.labels:
            row.suptitle(picture.labels[head], fontsize="medium")
        right.suptitle(f"keys of the query at frame {at[0]}, row {at[1]}, column {at[2]}")
        panels = right.subplots(math.ceil(frames / columns), columns, squeeze=False)
        for frame, panel in enumerate(panels.flat):
            panel.axis("off")
            if frame < frames:
                panel.imshow(picture.seen[head, frame], vmin=0, vmax=1, cmap="Blues")
                panel.set_title(str(frame), fontsize=7, pad=1)
            if frame == at[0]:
                panel.plot(at[2], at[1], "r.", markersize=4)
    figure.savefig(path)


def draw_table(table: HeadTable, path: str | Path) -> None:
    """Write a head table as an image, layers down and heads to the right, one colour per mode.

    Ranges of steps with rows of their own stand side by side.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    names, phases = list(table.shares()), table.all_rows
    figure = _figure((4 + len(phases) * table.head_count / 4, 2 + table.layer_count / 4))
    panels = figure.subplots(1, len(phases), squeeze=False)[0]
    for axes, start, rows in zip(panels, (0, *table.starts), phases, strict=True):
        index = torch.tensor([[names.index(name) for name in row] for row in rows])
        image = axes.imshow(index, cmap="tab20", vmin=-0.5, vmax=19.5)
        axes.set(xlabel="head", ylabel="layer", title=f"from step {start}" if table.later else "")
    shares = table.shares()
    if len(names) <= 20:
        ticks, edges = range(len(names)), [i - 0.5 for i in range(len(names) + 1)]
        bar = figure.colorbar(image, ax=list(panels), ticks=ticks, boundaries=edges)
        bar.set_ticklabels([f"{name} {shares[name]:.0%}" for name in names])
    figure.savefig(path)


def _figure(size: tuple[float, float]) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(f"pictures need matplotlib: pip install 'dit-accel[metrics]' ({error})") from None
    return Figure(figsize=size, layout="constrained", dpi=120)
