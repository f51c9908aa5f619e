"""What a comparison says: one line per candidate, as Markdown and as a Pareto plot of speed and closeness."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from dit_accel.compare.candidates import CEILING, DENSE
from dit_accel.errors import UnsupportedError


@dataclass(frozen=True)
class Line:
    """A candidate over all prompts.

    Args:
        candidate: its label.
        ratio, ratio_low, ratio_high: median, smallest and largest of the ratios of dense to candidate time.
        seconds: median.
        density: mean over the prompts, dense calls included.
        psnr, ssim, lpips: medians; lpips None where it was not computed.
        flicker: change from frame to frame relative to dense, median.
        peak_mib: largest; None on the CPU.
        follows: share of the prompts that meet each criterion; empty without a judge.
        is_best: no other candidate is both faster and closer.
    """

    candidate: str
    ratio: float
    ratio_low: float
    ratio_high: float
    seconds: float
    density: float
    psnr: float
    ssim: float
    lpips: float | None
    flicker: float
    peak_mib: float | None
    follows: dict[str, float]
    is_best: bool = False


def summarise(rows: Sequence[Mapping[str, Any]], criteria: Sequence[str] = ()) -> list[Line]:
    """One line per candidate, in the order of the rows."""
    lines = []
    for name in dict.fromkeys(row["candidate"] for row in rows):
        mine = [row for row in rows if row["candidate"] == name]
        near = [row["lpips"] for row in mine if row["lpips"] is not None]
        peaks = [row["peak_mib"] for row in mine if row["peak_mib"] is not None]
        lines.append(
            Line(
                candidate=name,
                ratio=median(row["ratio"] for row in mine),
                ratio_low=min(row["ratio_low"] for row in mine),
                ratio_high=max(row["ratio_high"] for row in mine),
                seconds=median(row["seconds"] for row in mine),
                density=mean(row["density"] for row in mine),
                psnr=median(row["psnr"] for row in mine),
                ssim=median(row["ssim"] for row in mine),
                lpips=median(near) if near else None,
                flicker=median(row["flicker"] / max(row["flicker_dense"], 1e-12) for row in mine),
                peak_mib=max(peaks) if peaks else None,
                follows={c: mean(bool(row[c]) for row in mine) for c in criteria if all(c in row for row in mine)},
            )
        )
    best = pareto([(line.ratio, line.psnr) for line in lines if line.candidate not in (DENSE, CEILING)])
    return [Line(**{**vars(line), "is_best": (line.ratio, line.psnr) in best}) for line in lines]


def pareto(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no other one beats in one coordinate without losing in the other, by the first coordinate."""
    points = sorted(set(points), reverse=True)
    best: list[tuple[float, float]] = []
    for point in points:
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best[::-1]


def to_markdown(lines: Sequence[Line], head: Mapping[str, Any]) -> str:
    """The table, with what it was made with in front of it."""
    criteria = list(lines[0].follows)
    has_lpips = any(line.lpips is not None for line in lines)
    has_peak = any(line.peak_mib is not None for line in lines)
    names = ["candidate", "time", "ratio", "density", "PSNR dB", "SSIM", *(["LPIPS"] if has_lpips else [])]
    names += ["change per frame", *(["peak MiB"] if has_peak else []), *criteria, "best"]
    text = [f"{name}: {value}  " for name, value in head.items()]
    text += ["", f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for line in lines:
        spread = f"{line.ratio:.2f}x ({line.ratio_low:.2f}-{line.ratio_high:.2f})"
        cells = [line.candidate, f"{line.seconds:.2f} s", spread, f"{line.density:.3f}"]
        cells += [f"{line.psnr:.1f}", f"{line.ssim:.4f}"]
        cells += [("" if line.lpips is None else f"{line.lpips:.4f}")] if has_lpips else []
        cells.append(f"{line.flicker:.3f}x")
        cells += [("" if line.peak_mib is None else f"{line.peak_mib:.0f}")] if has_peak else []
        cells += [f"{line.follows[name]:.0%}" for name in criteria] + ["yes" if line.is_best else ""]
        text.append(f"| {' | '.join(cells)} |")
    text += [
        "",
        "Ratio: dense time over candidate time of the denoising loop, taken within a round; median, smallest and "
        "largest. Closeness is to the dense clip of the same prompt and seed; 100 dB stands for identical. "
        f"{CEILING!r} computes dense attention with our kernel: it differs by rounding alone, and no candidate can be "
        "expected to be closer. Change per frame is relative to dense. Best: no other candidate is both faster and "
        "closer.",
    ]
    return "\n".join(text) + "\n"


def plot_pareto(lines: Sequence[Line], path: Path) -> None:
    """Speed to the right, closeness upwards, the best candidates joined; a PNG or SVG by the suffix of `path`.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UnsupportedError("the plot needs matplotlib: pip install 'dit_accel[metrics]'") from None
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    ceiling = [line.psnr for line in lines if line.candidate == CEILING]
    for line in (line for line in lines if line.candidate not in (DENSE, CEILING)):
        bars = [[line.ratio - line.ratio_low], [line.ratio_high - line.ratio]]
        axes.errorbar(line.ratio, line.psnr, xerr=bars, fmt="o" if line.is_best else "x", color="C0", capsize=2)
        axes.annotate(line.candidate, (line.ratio, line.psnr), xytext=(5, 5), textcoords="offset points", fontsize=8)
    best = [(line.ratio, line.psnr) for line in lines if line.is_best]
    axes.plot(*zip(*sorted(best), strict=True), color="C0", alpha=0.4) if best else None
    if ceiling:
        axes.axhline(ceiling[0], linestyle=":", color="grey", label="dense with another kernel")
        axes.legend(loc="lower left", fontsize=8)
    axes.axvline(1.0, linestyle=":", color="grey")
    axes.set_xlabel("times faster than dense (denoising loop)")
    axes.set_ylabel("PSNR to the dense clip, dB")
    figure.savefig(path, dpi=150)
