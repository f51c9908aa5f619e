"""Pictures of the demo for the README: `python samples/demo_screenshots.py` serves the page, uses it and takes them.

Needs the `demo` extra, Playwright and a Chromium of the system. Files are palette PNGs, each far below 300 kB.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

WIDTH, HEIGHT = 1180, 1000
PATIENCE_MS = 30 * 60 * 1000
FOLDER = Path("docs/images")


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve, click, photograph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pictures")
    parser.add_argument("--preset", default="tiny-wan/composed", help="preset of the accelerated run")
    parser.add_argument("--prompt", default="a red ball moving right on a white background")
    parser.add_argument("--steps", type=int, help="denoising steps; default: the preset's")
    parser.add_argument("--chunks", type=int, default=6, help="chunks of the stream")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        _photograph(options, Path(folder))


def _photograph(options: argparse.Namespace, folder: Path) -> None:
    from playwright.sync_api import sync_playwright

    from dit_accel.pipelines.demo.app import launch
    from dit_accel.pipelines.demo.jobs import Studio

    served, address = launch(Studio(options.preset, folder), port=0, wait=False)
    try:
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=_chromium(), args=["--no-sandbox", "--disable-gpu"])
            page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
            page.set_default_timeout(PATIENCE_MS)
            page.goto(address)
            _generate(page, options)
            _methods(page, options.output)
            _stream(page, options)
            browser.close()
    finally:
        served.close()


def _chromium() -> str:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        raise SystemExit("no Chromium on this machine: apt-get install chromium")
    return found


def _generate(page: Any, options: argparse.Namespace) -> None:
    """Dense beside accelerated, and the report of the run."""
    page.locator("#prompt textarea").fill(options.prompt)
    if options.steps is not None:
        page.locator("#steps input").fill(str(options.steps))
    page.locator("#start").click()
    page.locator("#figures table").first.wait_for()
    for name in ("dense", "fast", "difference"):
        _show_frame(page.locator(f"#video-{name} video"), 0.5)
    _save(page, options.output / "demo-generate.png")
    page.get_by_role("tab", name="Report").click()
    page.frame_locator("#report iframe").locator("svg").first.scroll_into_view_if_needed()
    _save(page, options.output / "demo-report.png")


def _methods(page: Any, folder: Path) -> None:
    """What a method computes."""
    page.get_by_role("tab", name="Methods").click()
    page.locator("#draw").click()
    page.locator("#method-image img").wait_for()
    _save(page, folder / "demo-methods.png")


def _stream(page: Any, options: argparse.Namespace) -> None:
    """A stream whose prompt was changed on the way."""
    page.get_by_role("tab", name="Stream").click()
    page.locator("#stream-prompt textarea").fill(options.prompt)
    page.locator("#stream-chunks input").fill(str(options.chunks))
    page.locator("#stream-start").click()
    status = page.locator("#stream-status")
    status.filter(has_text=re.compile(r"Chunk \d+ of")).wait_for()
    page.locator("#stream-prompt textarea").fill("a blue square moving left on a white background")
    page.locator("#stream-say").click()
    status.filter(has_text="Done.").wait_for()
    _show_frame(page.locator("#stream-video video"), 0.9)
    _save(page, options.output / "demo-stream.png")


def _show_frame(video: Any, share: float) -> None:
    """Stop a clip at a share of its length, so that pictures made twice show the same frame."""
    video.evaluate(
        """async (video, share) => {
            video.pause(); video.loop = false;
            if (video.readyState < 1) await new Promise(done => video.onloadedmetadata = done);
            await new Promise(done => { video.onseeked = done; video.currentTime = share * video.duration; });
        }""",
        share,
    )


def _save(page: Any, path: Path) -> None:
    """The visible part of the page in 256 colours."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)  # of a tab that fades in
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
