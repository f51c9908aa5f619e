"""The demo in a real browser: generate, compare, cancel, bad input, keyboard, narrow screen."""

from __future__ import annotations

import json
import re

import pytest

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
api.expect.set_options(timeout=60_000)


def number(page, name, value):
    page.locator(f"#{name} input").fill(str(value))
    page.locator(f"#{name} input").blur()


def small(page, steps=2):
    for name, value in (("height", 32), ("width", 32), ("frames", 5), ("steps", steps)):
        number(page, name, value)


def expect_status(page, pattern):
    api.expect(page.locator("#status")).to_contain_text(re.compile(pattern), timeout=60_000)


def test_generate_and_compare(page):
    small(page)
    page.locator("#start").click()
    expect_status(page, r"accelerated: done")
    api.expect(page.locator("#figures")).to_contain_text("PSNR against dense")
    for name in ("dense", "fast", "difference"):
        source = page.locator(f"#video-{name} video").get_attribute("src")
        response = page.request.get(source)
        assert response.ok
        assert response.body()[4:8] == b"ftyp"
    page.get_by_role("tab", name="Report").click()
    frame = page.frame_locator("#report iframe")
    api.expect(frame.locator("body")).to_contain_text("a red ball moving right")
    assert frame.locator("svg").count() > 0


def test_enter_starts_and_cancel_stops(page):
    small(page, steps=400)
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Enter")
    expect_status(page, r"step \d+ of 400")
    page.locator("#cancel").click()
    expect_status(page, "Cancelled")
    small(page)
    page.locator("#start").click()
    expect_status(page, r"accelerated: done")


def test_bad_input_is_one_clear_line(page):
    small(page)
    number(page, "height", 33)
    page.locator("#start").click()
    expect_status(page, r"Error: generation\.height: expected a multiple of 16, got 33")
    small(page)
    page.locator("#prompt textarea").fill("   ")
    page.locator("#start").click()
    expect_status(page, "Error: The prompt is empty")


def test_the_keyboard_alone_reaches_every_control_in_order(page):
    small(page)
    page.locator("#prompt textarea").focus()
    reached = ["prompt"]
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.closest('[id]:not(input):not(textarea)')?.id ?? ''"))
        if reached[-1] == "start":
            break
    wanted = ["prompt", "preset", "height", "width", "frames", "steps", "seed", "dense", "start"]
    assert [name for name in reached if name in wanted] == wanted
    page.keyboard.press("Enter")
    expect_status(page, r"accelerated: done")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "cancel"


@pytest.mark.parametrize("tab", ["Generate", "Report", "Methods", "Stream"])
def test_a_narrow_screen_needs_no_scrolling_sideways(page, tab):
    page.set_viewport_size({"width": 390, "height": 844})
    page.get_by_role("tab", name=tab).click()
    button = {"Generate": "#start", "Report": "#report", "Methods": "#draw", "Stream": "#stream-start"}[tab]
    api.expect(page.locator(button)).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(button).bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 390


def test_files_outside_the_output_folder_are_not_served(page, address):
    for path in ("/etc/passwd", "pyproject.toml", "../../etc/passwd"):
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404)


def test_methods_page_draws_any_grid(page):
    page.get_by_role("tab", name="Methods").click()
    page.locator("#grid textarea, #grid input").first.fill("3x7x9")
    page.locator("#draw").click()
    api.expect(page.locator("#method-told")).to_contain_text("Density")
    api.expect(page.locator("#method-image img")).to_be_visible()
    page.locator("#grid textarea, #grid input").first.fill("many")
    page.locator("#draw").click()
    api.expect(page.locator("#method-told")).to_contain_text("Error")


def test_stream_grows_and_takes_a_new_prompt(page):
    page.get_by_role("tab", name="Stream").click()
    for name, value in (("stream-height", 32), ("stream-width", 32), ("stream-chunks", 30)):
        number(page, name, value)
    page.locator("#stream-start").click()
    status = page.locator("#stream-status")
    api.expect(status).to_contain_text(re.compile(r"Chunk \d+ of 30"))
    page.locator("#stream-prompt textarea").fill("a blue square moving left")
    page.locator("#stream-say").click()
    api.expect(status).to_contain_text("Prompt: a blue square moving left")
    page.locator("#stream-cancel").click()
    api.expect(status).to_contain_text("Cancelled")
    api.expect(page.locator("#stream-video video")).to_be_visible()
    saved = page.request.get(page.locator("#stream-history a").first.get_attribute("href")).json()
    assert 0 < saved["chunks"] < 30
    assert saved["changes"][-1]["prompt"] == "a blue square moving left"


def test_a_history_is_replayed(page, tmp_path):
    changes = [{"chunk": 0, "prompt": "a green star"}, {"chunk": 1, "prompt": "a yellow star", "mode": "recache"}]
    history = {"seed": 3, "height": 32, "width": 32, "chunks": 2, "changes": changes}
    (tmp_path / "history.json").write_text(json.dumps(history))
    page.get_by_role("tab", name="Stream").click()
    page.locator("#stream-replay input[type=file]").set_input_files(tmp_path / "history.json")
    api.expect(page.locator("#stream-replay")).to_contain_text("history")
    page.locator("#stream-start").click()
    status = page.locator("#stream-status")
    api.expect(status).to_contain_text(re.compile(r"Done\. Chunk 2 of 2.*Prompt: a yellow star"))
    saved = page.request.get(page.locator("#stream-history a").first.get_attribute("href"))
    assert [change["prompt"] for change in saved.json()["changes"]] == ["a green star", "a yellow star"]


def test_the_page_is_for_this_machine_and_takes_no_large_files(page, address):
    assert address.startswith("http://127.0.0.1:")
    sizes = {}
    for size in (1, 9):
        file = {"name": "x.json", "mimeType": "application/json", "buffer": b" " * (size << 20)}
        sizes[size] = page.request.post(f"{address}gradio_api/upload", multipart={"files": file}).status
    assert sizes == {1: 200, 9: 413}
