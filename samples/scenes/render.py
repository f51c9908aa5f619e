"""Scenes to pixels, many at once and on any device: shapes are signed distances, edges are a pixel wide."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dit_accel.samples.clips import BACKGROUNDS, COLORS, SHAPES, outline
from dit_accel.samples.scenes.draw import Canvas, Scene
from dit_accel.samples.scenes.meaning import TEXTURES

TONE = 26.0  # by which textures are lighter and darker than the backdrop, of 255
_SOFT = 2.0  # pixels over which a texture changes from dark to light
_DOT = 0.3  # radius of a dot in periods


@torch.no_grad()
def render_scenes(scenes: Sequence[Scene], canvas: Canvas, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """Draw the clips of `scenes`.

    Args:
        scenes: B of them.
        canvas: frames T, height H and width W.
        device: where to draw.

    Returns:
        Pixels in [-1, 1], `[B, 3, T, H, W]`, and where some thing is, bool `[B, T, H, W]`.
    """
    image = _draw_backdrops(scenes, canvas, device)
    covered = torch.zeros(len(scenes), canvas.frames, canvas.height, canvas.width, device=device)
    for number in range(max(len(scene.bodies) for scene in scenes)):
        rows = [row for row, scene in enumerate(scenes) if len(scene.bodies) > number]
        cover = _cover([scenes[row] for row in rows], number, canvas, device)
        colors = [COLORS[scenes[row].meaning.things[number].color] for row in rows]
        paint = _tensor(colors, device).view(-1, 3, 1, 1, 1)
        image[rows] = torch.lerp(image[rows], paint, cover.unsqueeze(1))
        covered[rows] = torch.maximum(covered[rows], cover)
    return (image.round_() / 127.5 - 1), covered > 0


def _tensor(values: object, device: str | torch.device) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32)).to(device)


def _draw_backdrops(scenes: Sequence[Scene], canvas: Canvas, device: str | torch.device) -> Tensor:
    """Plain or textured backdrops, `[B, 3, T, H, W]` in 0..255."""
    colors = _tensor([BACKGROUNDS[scene.meaning.backdrop.color] for scene in scenes], device)
    image = colors.view(-1, 3, 1, 1, 1).expand(-1, -1, canvas.frames, canvas.height, canvas.width).clone()
    for texture in TEXTURES:
        rows = [row for row, scene in enumerate(scenes) if scene.meaning.backdrop.texture == texture]
        if rows:
            image[rows] += TONE * _texture(texture, [scenes[row] for row in rows], canvas, device).unsqueeze(1)
    return image.clamp_(0, 255)


def _texture(name: str, scenes: Sequence[Scene], canvas: Canvas, device: str | torch.device) -> Tensor:
    """Values of a texture in [-1, 1], `[B, T, H, W]`."""
    period = _tensor([scene.period for scene in scenes], device).view(-1, 1, 1)
    phase, slide = (_tensor([getattr(scene, what) for scene in scenes], device) for what in ("phase", "slide"))
    moved = phase[:, None] + torch.arange(canvas.frames, device=device).view(-1, 1) * slide[:, None]
    x = torch.arange(canvas.width, device=device) - moved[..., :1]
    y = torch.arange(canvas.height, device=device) - moved[..., 1:]
    if name == "dots":
        x, y = ((at / period + 0.5) % 1 - 0.5 for at in (x, y))
        from_edge = (_DOT - torch.hypot(x.unsqueeze(2), y.unsqueeze(3))) * period.unsqueeze(-1)
        return (2 * from_edge / _SOFT).clamp_(-1, 1)
    x, y = ((torch.sin(at / period * 2 * torch.pi) * period / torch.pi / _SOFT).clamp_(-1, 1) for at in (x, y))
    if name == "checks":
        return x.unsqueeze(2) * y.unsqueeze(3)
    is_upright = torch.tensor([scene.is_upright for scene in scenes], device=device).view(-1, 1, 1, 1)
    return torch.where(is_upright, x.unsqueeze(2), y.unsqueeze(3))


def _cover(scenes: Sequence[Scene], number: int, canvas: Canvas, device: str | torch.device) -> Tensor:
    """Share of each pixel that thing `number` of each scene covers, `[B, T, H, W]`."""
    bodies = [scene.bodies[number] for scene in scenes]
    shapes = [scene.meaning.things[number].shape for scene in scenes]
    centers = _tensor([body.centers(canvas) for body in bodies], device)
    radii = _tensor([body.radii(canvas.frames) for body in bodies], device)
    x = torch.arange(canvas.width, device=device) - centers[..., :1]
    y = torch.arange(canvas.height, device=device) - centers[..., 1:]
    distance = torch.empty(len(scenes), canvas.frames, canvas.height, canvas.width, device=device)
    for shape in SHAPES:
        rows = [row for row, name in enumerate(shapes) if name == shape]
        if not rows:
            continue
        across, down, radius = x[rows].unsqueeze(2), y[rows].unsqueeze(3), radii[rows]
        if shape == "ball":
            distance[rows] = torch.hypot(across, down) - radius[..., None, None]
        else:
            turns = _tensor([bodies[row].turn for row in rows], device).view(-1, 1)
            angle = turns * torch.arange(canvas.frames, device=device)
            distance[rows] = _polygon_distance(across, down, _corners(shape, angle, radius))
    return (0.5 - distance).clamp_(0, 1)


def _corners(shape: str, angle: Tensor, radius: Tensor) -> Tensor:
    """Corners (x, y) around the centre, turned by `angle` and scaled by `radius` (both `[B, T]`): `[B, T, n, 2]`."""
    corners = _tensor(outline(shape), angle.device)
    cos, sin = angle.cos().unsqueeze(-1), angle.sin().unsqueeze(-1)
    turned = torch.stack([cos * corners[:, 0] - sin * corners[:, 1], sin * corners[:, 0] + cos * corners[:, 1]], dim=-1)
    return turned * radius[..., None, None]


def _polygon_distance(x: Tensor, y: Tensor, corners: Tensor) -> Tensor:
    """Signed distance of pixels to polygons, negative inside: `[B, T, H, W]`.

    The distance is that to the nearest edge; a pixel is inside when a ray from it crosses the outline an odd number of
    times.

    Args:
        x, y: of the pixels, `[B, T, 1, W]` and `[B, T, H, 1]`.
        corners: `[B, T, n, 2]`.
    """
    nearest: Tensor | float = float("inf")
    inside = torch.zeros((), dtype=torch.bool, device=x.device)
    for begin, end in zip(corners.unbind(2), corners.roll(-1, dims=2).unbind(2), strict=True):
        (ax, ay), (bx, by) = (tuple(part[..., None, None] for part in point.unbind(-1)) for point in (begin, end))
        px, py, ex, ey = x - ax, y - ay, bx - ax, by - ay
        along = ((px * ex + py * ey) / (ex * ex + ey * ey)).clamp_(0, 1)
        squared = (px - along * ex).square() + (py - along * ey).square()
        nearest = squared if isinstance(nearest, float) else torch.minimum(nearest, squared)
        crosses = ((ay > y) != (by > y)) & ((px * ey < py * ex) == (ey > 0))
        inside = inside ^ crosses
    distance = torch.as_tensor(nearest).sqrt()
    return torch.where(inside, -distance, distance)
