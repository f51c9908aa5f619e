"""Heat maps and pictures of plans as inline SVG, for the report page."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Cells = Mapping[tuple[int, int], tuple[float, str]]
"""Value and hover text of each (layer, step)."""

# Anchors of a perceptually even ramp from dark blue to yellow, which stays ordered in grey and for colour-blind eyes.
_RAMP = ((68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37))
_LEFT, _TOP, _BAR = 46, 8, 70


def color(share: float) -> str:
    """Colour of a value in [0, 1], clamped, as `#rrggbb`."""
    at = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    first = min(int(at), len(_RAMP) - 2)
    mixed = (round(a + (b - a) * (at - first)) for a, b in zip(_RAMP[first], _RAMP[first + 1], strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def heat_map(
    title: str,
    unit: str,
    cells: Cells,
    limits: tuple[float, float] | None = None,
    axes: tuple[Sequence[int], Sequence[int]] | None = None,
) -> str:
    """Layers go down, steps go right; a cell without a value is left empty. Hovering shows value and text.

    Args:
        title: heading.
        unit: what stands at the colour bar.
        cells: value and hover text by (layer, step).
        limits: values of the first and last colour. Default: 0 to the largest value.
        axes: layers and steps to show. Default: those of the cells.
    """
    layers, steps = axes or (sorted({layer for layer, _ in cells}), sorted({step for _, step in cells}))
    low, high = limits or (0.0, max((value for value, _ in cells.values()), default=0.0) or 1.0)
    width, height = _cell_size(len(steps), 760, 24), _cell_size(len(layers), 420, 18)
    body = []
    for (layer, step), (value, text) in sorted(cells.items()):
        x, y = _LEFT + steps.index(step) * width, _TOP + layers.index(layer) * height
        told = html.escape(f"layer {layer}, step {step}: {value:.4g} {unit}" + (f"\n{text}" if text else ""))
        fill = color((value - low) / (high - low) if high > low else 0.0)
        body.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="{fill}"><title>{told}</title></rect>'
        )
    right, bottom = _LEFT + len(steps) * width, _TOP + len(layers) * height
    body += _axis(layers, lambda i: (_LEFT - 6, _TOP + (i + 0.5) * height + 4), "end", max(1, round(14 / height)))
    body += _axis(steps, lambda i: (_LEFT + (i + 0.5) * width, bottom + 14), "middle", max(1, round(26 / width)))
    body.append(f'<text x="{(_LEFT + right) / 2:.0f}" y="{bottom + 30}" text-anchor="middle">step</text>')
    body.append(
        f'<text transform="translate(12 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">layer</text>'
    )
    body += _color_bar(right + 16, low, high, unit, max(bottom - _TOP, 60))
    size = f'width="{right + 16 + _BAR}" height="{max(bottom, _TOP + 60) + 36}"'
    return f"<figure><figcaption>{html.escape(title)}</figcaption><svg {size}>{''.join(body)}</svg></figure>"


def plan_picture(title: str, shape: Sequence[int], shares: bytes) -> str:
    """The coarse picture of a plan: queries go down, keys go right, brighter cells compute more.

    Args:
        title: caption.
        shape: (rows, columns).
        shares: one byte per cell, 255 = everything.
    """
    rows, columns = shape
    size = 192
    # One image per picture: thousands of rectangles would make the page slow.
    image = (
        f'<image width="{size}" height="{size}" preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="data:image/png;base64,{base64.b64encode(_png(rows, columns, shares)).decode("ascii")}"/>'
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg width="{size}" height="{size}" role="img">{image}</svg></figure>'
    )


def _png(rows: int, columns: int, shares: bytes) -> bytes:
    import imageio.v3 as imageio
    import numpy as np

    ramp = np.array([[int(color(i / 255)[at : at + 2], 16) for at in (1, 3, 5)] for i in range(256)], dtype=np.uint8)
    pixels = ramp[np.frombuffer(shares, dtype=np.uint8).reshape(rows, columns)]
    written: bytes = imageio.imwrite("<bytes>", pixels, extension=".png")
    return written


def _cell_size(count: int, room: int, largest: int) -> int:
    return max(3, min(largest, room // max(1, count)))


def _axis(values: Sequence[int], place: Callable[[int], tuple[float, float]], anchor: str, every: int) -> list[str]:
    shown = [(i, value) for i, value in enumerate(values) if i % every == 0]
    return [
        f'<text x="{place(i)[0]:.0f}" y="{place(i)[1]:.0f}" text-anchor="{anchor}">{value}</text>' for i, value in shown
    ]


def _color_bar(x: int, low: float, high: float, unit: str, height: int) -> list[str]:
    parts: list[Any] = []
    for i in range(20):
        y = _TOP + height * (19 - i) / 20
        parts.append(f'<rect x="{x}" y="{y:.1f}" width="12" height="{height / 20 + 0.5:.1f}" fill="{color(i / 19)}"/>')
    for value, y in ((high, _TOP + 9), (low, _TOP + height)):
        parts.append(f'<text x="{x + 16}" y="{y:.0f}">{value:.3g}</text>')
    parts.append(f'<text x="{x + 16}" y="{_TOP + height / 2 + 4:.0f}">{html.escape(unit)}</text>')
    return parts
