"""One self-contained HTML page from the JSON report of a run: no script, no link to anything outside the file."""

from __future__ import annotations

import base64
import html
import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from dit_accel.errors import ConfigError
from dit_accel.report.charts import Cells, heat_map, plan_picture
from dit_accel.report.records import PHASES

LARGEST_VIDEO = 8 * 2**20
"""Bytes; larger videos are named, not embedded."""
_MEDIA = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; border-bottom: 1px solid var(--line); }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; } figcaption { font-size: .85rem; color: var(--dim); }
svg text { font-size: 11px; fill: currentColor; } pre { background: #8881; padding: .8rem; overflow-x: auto; }
video, img { max-width: 100%; min-width: 240px; image-rendering: auto; }
"""


def read_run(path: str | Path) -> dict[str, Any]:
    """Read a report that `Report.to_json` or `generate-video` wrote.

    Older ones of streams and of videos of several prompts have no calls.

    Raises:
        ConfigError: no such file, not JSON, or not such a report.
    """
    try:
        run = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(str(path), f"cannot read it: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(str(path), f"expected JSON: {error}") from None
    needed = {"component", "layer", "step", "density", "reason", *(f"{phase}_ms" for phase in ("order", "attend"))}
    calls = run.get("calls", [] if run.keys() & {"stream", "layout"} else None) if isinstance(run, dict) else None
    if not isinstance(calls, list) or not all(isinstance(call, dict) and needed <= call.keys() for call in calls):
        raise ConfigError(str(path), "expected a report of a run, with its attention calls under `calls`")
    return run | {"calls": calls}


def find_video(report: str | Path) -> Path | None:
    """The video that stands beside a report under the same name, or None."""
    beside = (Path(report).with_suffix(suffix) for suffix in _MEDIA)
    return next((path for path in beside if path.is_file()), None)


def render_page(run: Mapping[str, Any], video: Path | None = None) -> str:
    """The page, as HTML.

    Args:
        run: what `read_run` returns.
        video: embedded when it is at most `LARGEST_VIDEO` bytes. Default: none.
    """
    title = _prompts(run) or (run.get("settings") or {}).get("preset") or "run"
    parts = [
        f"<h1>{html.escape(str(title))}</h1>",
        _video(video),
        _section("In short", _facts(_headline(run))),
        _section("Chunks", _chunks(run)),
        *(_maps(run, component) for component in dict.fromkeys(call["component"] for call in run["calls"])),
        _section("What the plans look like", _pictures(run)),
        _section("Why calls ran dense", _counts(run.get("dense_reasons") or {})),
        _section("Stream", _yaml(run.get("stream"))),
        _section("Resolved preset", _yaml(run.get("preset") or run.get("settings"))),
        _section("Made with", _facts({**(run.get("environment") or {}), "date": run.get("date", "")})),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(str(title))}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{body}" if body else ""


def _facts(values: Mapping[str, Any]) -> str:
    rows = (
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(str(value))}</td></tr>"
        for name, value in values.items()
        if value not in (None, "")
    )
    return f"<table>{''.join(rows)}</table>"


def _counts(values: Mapping[str, int]) -> str:
    rows = (
        f'<tr><td class="n">{count}</td><td>{html.escape(name)}</td></tr>'
        for name, count in sorted(values.items(), key=lambda item: -item[1])
    )
    return f"<table>{''.join(rows)}</table>" if values else ""


def _yaml(value: Any) -> str:
    return f"<pre>{html.escape(yaml.safe_dump(value, sort_keys=False))}</pre>" if value else ""


def _prompts(run: Mapping[str, Any]) -> str:
    """The prompt of a run, or those of a stream or of several clips."""
    several = [each["prompt"] if isinstance(each, dict) else each for each in run.get("prompts") or []]
    return str(run.get("prompt") or " | ".join(several))


def _chunks(run: Mapping[str, Any]) -> str:
    """Seconds that every chunk of a stream took, and what its attention calls came to."""
    times = zip(run.get("denoise_s") or [], run.get("decode_s") or [], strict=True)
    sums = {each["chunk"]: each for each in run.get("chunks") or []}
    rows = [
        f'<tr><td class="n">{number}</td><td class="n">{denoise:.2f} s denoising</td>'
        f'<td class="n">{decode:.2f} s decoding</td>{_calls_of_chunk(sums.get(number))}</tr>'
        for number, (denoise, decode) in enumerate(times, 1)
    ]
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _calls_of_chunk(sums: Mapping[str, Any] | None) -> str:
    if not sums or not sums["calls"]:
        return ""
    seconds = sum(sums["seconds"].values())
    return f"<td>density {sums['density']:.3f} in {sums['calls']} calls, attention {seconds:.2f} s</td>"


def _headline(run: Mapping[str, Any]) -> dict[str, Any]:
    calls, settings, times = run["calls"], run.get("settings") or {}, run.get("times") or {}
    sparse = [call for call in calls if call["reason"] is None]
    bounds = [call["error_bound"] for call in calls if "error_bound" in call]
    seconds = run.get("seconds") or {}
    budget = (settings.get("schedule") or {}).get("max_error")
    part = "last chunk, whose calls are shown" if run.get("chunks") else "whole run"
    return {
        "method": f"{settings.get('method', '')} {settings.get('parameters') or ''}".strip(),
        "seed": run.get("seed"),
        "attention calls": f"{len(calls)}, of which {len(sparse)} sparse" if calls or settings else None,
        "frames per second, denoising": f"{run['denoise_fps']:.2f}" if "denoise_fps" in run else None,
        "frames per second, all": f"{run['end_to_end_fps']:.2f}" if "end_to_end_fps" in run else None,
        "first frame after": f"{run['first_frame_latency_s']:.2f} s" if "first_frame_latency_s" in run else None,
        "caches": f"{run['cache_bytes'] / 2**20:.1f} MiB" if "cache_bytes" in run else None,
        "backend": ", ".join(sorted({call["backend"] for call in sparse})),
        "density": f"{run['density']:.3f} over the {part}" if "density" in run else None,
        "density of sparse calls": f"{mean(call['density'] for call in sparse):.3f}" if sparse else None,
        "attention seconds": ", ".join(f"{name} {value:.2f}" for name, value in seconds.items() if value),
        "denoising seconds": f"{times['denoise']:.2f}" if "denoise" in times else None,
        "largest error bound": f"{max(bounds):.3g}" + (f" (budget {budget})" if budget else "") if bounds else None,
        "peak memory": ", ".join(f"{name} {mib:.0f} MiB" for name, mib in (run.get("peak_memory_mib") or {}).items()),
    }


def _maps(run: Mapping[str, Any], component: str) -> str:
    """Density, time and error of one transformer over layers and steps, averaged over guidance branches."""
    calls = [call for call in run["calls"] if call["component"] == component]

    def milliseconds(call: Mapping[str, Any]) -> float:
        return float(sum(call.get(f"{phase}_ms", 0.0) for phase in PHASES))

    def phases(call: Mapping[str, Any]) -> str:
        return ", ".join(f"{phase} {call[f'{phase}_ms']:.2f}" for phase in PHASES if call.get(f"{phase}_ms"))

    axes = sorted({call["layer"] for call in calls}), sorted({call["step"] for call in calls})
    maps = [
        heat_map("density, realised", "of pairs", _cells(calls, lambda c: c["density"], _told), (0.0, 1.0), axes),
        heat_map("time", "ms", _cells(calls, milliseconds, phases), axes=axes),
    ]
    asked = _cells(calls, lambda c: c.get("requested_density"), _told)
    if asked:
        maps.insert(1, heat_map("density, requested", "of pairs", asked, (0.0, 1.0), axes))
    errors = _cells(calls, lambda c: c.get("error"), lambda c: f"bound {c['error_bound']:.3g}")
    if errors:
        maps.append(heat_map("estimated relative error", "", errors, axes=axes))
    return _section(f"Layers and steps: {component}", "".join(maps))


def _told(call: Mapping[str, Any]) -> str:
    how = f"{call['method']} on {call['backend']}"
    asked = call.get("requested_density")
    return f"dense: {call['reason']}" if call["reason"] else how + (f", {asked:g} requested" if asked else "")


def _cells(calls: list[dict[str, Any]], value: Callable[[Any], float | None], told: Callable[[Any], str]) -> Cells:
    """Mean over the guidance branches of a (layer, step), and the text of each branch."""
    groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for call in calls:
        if value(call) is not None:
            groups[call["layer"], call["step"]].append(call)
    return {
        place: (mean(value(call) or 0.0 for call in group), "\n".join(dict.fromkeys(told(call) for call in group)))
        for place, group in groups.items()
    }


def _pictures(run: Mapping[str, Any]) -> str:
    pictures = []
    for shot in run.get("pictures") or []:
        heads = shot["density_per_head"]
        spread = f"{min(heads):.2f} to {max(heads):.2f} by head" if len(heads) > 1 else f"{heads[0]:.2f}"
        title = f"{shot['component']} layer {shot['layer']}, step {shot['step']}, {shot['method']}: density {spread}"
        pictures.append(plan_picture(title, shot["shape"], base64.b64decode(shot["shares"])))
    note = "<p>Queries go down, keys go right, both in the order of the method; brighter cells compute more pairs.</p>"
    return note + "".join(pictures) if pictures else ""


def _video(path: Path | None) -> str:
    if path is None:
        return ""
    media = _MEDIA.get(path.suffix.lower())
    if media is None:
        raise ConfigError("--video", f"expected a name that ends in {', '.join(_MEDIA)}, got {str(path)!r}")
    if path.stat().st_size > LARGEST_VIDEO:
        size = path.stat().st_size / 2**20
        return f"<p>The video, {html.escape(path.name)}, has {size:.1f} MiB and is not embedded.</p>"
    data = f"data:{media};base64,{base64.b64encode(path.read_bytes()).decode('ascii')}"
    if media.startswith("video"):
        return f'<video controls loop autoplay muted src="{data}"></video>'
    return f'<img alt="the result" src="{data}">'
