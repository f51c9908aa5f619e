"""Figures and pictures that the demo shows."""

from __future__ import annotations

import html
from pathlib import Path

import numpy as np

from dit_accel.metrics import IDENTICAL_PSNR, closeness
from dit_accel.pipelines.demo.jobs import Clip
from dit_accel.report.page import render_page
from dit_accel.video.files import OutputFile

_CONTRAST = 4


def difference(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Absolute difference of two clips, four times as strong. uint8 `[T, H, W, 3]`."""
    apart = np.abs(first.astype(np.int16) - second.astype(np.int16))
    return np.clip(_CONTRAST * apart, 0, 255).astype(np.uint8)


def comparison(dense: Clip, fast: Clip, folder: Path, fps: int) -> tuple[Path, str]:
    """Write the difference of two clips as a video into `folder` and compare their times.

    Returns:
        The video's path and a Markdown table.
    """
    target = folder / fast.path.name.replace(fast.run, "difference")
    with OutputFile(target) as file:
        file.write(difference(dense.frames, fast.frames), fps)
    near = closeness(fast.frames / 255, dense.frames / 255)
    is_same = near.psnr == IDENTICAL_PSNR
    rows = [
        ("denoising, dense", f"{dense.denoise:.1f} s"),
        ("denoising, accelerated", f"{fast.denoise:.1f} s"),
        ("speed-up of the denoising", f"{dense.denoise / fast.denoise:.2f} x"),
        ("speed-up of the whole call", f"{dense.total / fast.total:.2f} x"),
        ("PSNR against dense", "identical" if is_same else f"{near.psnr:.1f} dB"),
        ("SSIM against dense", f"{near.ssim:.3f}"),
    ]
    if near.lpips is not None:
        rows.append(("LPIPS against dense", f"{near.lpips:.3f}"))
    return target, _table(rows)


def report_table(clip: Clip) -> str:
    """Density and reasons of the dense calls of a run, as Markdown."""
    calls = clip.report["calls"]
    sparse = [call for call in calls if call["reason"] is None]
    rows = [("attention calls", str(len(calls))), ("of them sparse", str(len(sparse)))]
    if sparse:
        rows.append(("density of the sparse calls", f"{np.mean([call['density'] for call in sparse]):.3f}"))
    reasons = [call["reason"] for call in calls if call["reason"] is not None]
    rows += [(f"dense: {reason}", str(reasons.count(reason))) for reason in sorted(set(reasons))]
    return _table(rows)


def report_page(clip: Clip) -> str:
    """The run's self-contained report in a frame of its own, without scripts, as HTML."""
    page = html.escape(render_page(clip.report, clip.path), quote=True)
    return f'<iframe sandbox title="Report" srcdoc="{page}" style="width:100%;height:80vh;border:0"></iframe>'


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(["| figure | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
