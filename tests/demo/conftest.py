"""A page served from this process and a headless Chromium to open it."""

from __future__ import annotations

import shutil

import pytest

ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="session")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine")
    with api.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=found, args=list(ARGUMENTS))
        yield instance
        instance.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory):
    pytest.importorskip("gradio")
    from dit_accel.pipelines.demo.app import launch
    from dit_accel.pipelines.demo.jobs import Studio

    studio = Studio("tiny-wan", tmp_path_factory.mktemp("page"), device="cpu")
    page, where = launch(studio, port=0, wait=False)
    yield where
    page.close()


@pytest.fixture
def page(browser, address):
    view = browser.new_page(viewport={"width": 1200, "height": 900})
    view.goto(address)
    view.set_default_timeout(30_000)
    yield view
    view.close()
